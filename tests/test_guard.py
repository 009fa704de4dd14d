"""A gradient that is not a number, or a loss that leaps: what the guard's policies promise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

from llm import ledger
from llm.audit import check, show_step
from llm.checkpoint import newest
from llm.guard import DivergedError, Guard, RollBack, Skip, Stop
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed, saved
from tests.test_resume import rows

SIX = st.floats(0.1, 10, allow_nan=False)


@given(st.lists(SIX, min_size=4, max_size=4), st.floats(0, 100), st.floats(1, 8))
def test_a_spike_lies_beyond_so_many_deviations_of_the_last_losses(
    before: list[float], loss: float, sigma: float
) -> None:
    guard = Stop(sigma, history=4)
    assert [guard.judge(1.0, value) for value in (50.0, *before)] == [None] * 5, "the first is forgotten"
    beyond = loss > statistics.fmean(before) + sigma * statistics.pstdev(before)
    assert (guard.judge(1.0, loss) is not None) == beyond
    assert list(guard.losses) == (before if beyond else [*before[1:], loss]), "a spike is no measure for the next"


@pytest.mark.parametrize(("norm", "loss"), [(math.nan, 1.0), (math.inf, None), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("guard", [Stop(6.0), Skip(), RollBack()])
def test_what_is_not_finite(guard: Guard, norm: float, loss: float | None) -> None:
    assert "is not finite" in str(guard.judge(norm, loss))
    assert guard.judge(1.0, 1.0) is None


def test_skips_in_a_row_are_counted_over_a_restart() -> None:
    guard, again = Skip(in_a_row=3), Skip(in_a_row=3)
    assert [guard.respond(step, "x") for step in (1, 3, 4)] == [None] * 3
    again.load_state_dict(guard.state_dict())
    assert str(again.respond(5, "x")) == "steps 3 to 5 were skipped one after the other: x"


class Poison(Callback):
    """Multiplies the loss of some batches on one rank; None makes it NaN."""

    def __init__(self, batches: list[int], factor: float | None, rank: int = 0) -> None:
        self.batches, self.rank = batches, rank
        self.factor = math.nan if factor is None else factor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.index in self.batches and trainer.global_rank == self.rank:
            pl_module.losses = self.poisoned(type(pl_module).losses.__get__(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        pl_module.__dict__.pop("losses", None)

    def poisoned(self, losses: Any) -> Any:
        def poisoned(*arguments: Any) -> Mapping[str, Any]:
            return {name: replace(loss, total=loss.total * self.factor) for name, loss in losses(*arguments).items()}

        return poisoned


class LeftOut(Callback):
    """The run that knew from the beginning."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.guard.left_out |= set(self.batches)


def poison(batches: list[int], factor: str = "null", rank: int = 0) -> list[str]:
    given = f"{{_target_: tests.test_guard.Poison, batches: {batches}, factor: {factor}, rank: {rank}}}"
    return [f"+callback.poison={given}", "packages=[tests]"]


def left_out(batches: list[int]) -> list[str]:
    return [f"+callback.left_out={{_target_: tests.test_guard.LeftOut, batches: {batches}}}", "packages=[tests]"]


RUN = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "callback.checkpoint.every_n_train_steps=2",
    "callback.checkpoint.save_top_k=-1",
)


def assert_same_end(one: Path, two: Path) -> None:
    """Weights and optimizer, bit for bit."""
    for kind in ("state_dict", "optimizer"):
        torch.testing.assert_close(saved(one)[kind], saved(two)[kind], rtol=0, atol=0)
    assert all(bool(value.isfinite().all()) for value in saved(one)["state_dict"].values())


@pytest.mark.parametrize("step", [5, 6, 8])
def test_stop_leaves_the_checkpoint_before(compose_run: Compose, tmp_path: Path, step: int) -> None:
    """Also where the bad step is one after which a checkpoint was due, or the last."""
    with pytest.raises(DivergedError, match=f"step {step}: the gradient is not finite - .*audit RUN --step {step}"):
        run(compose_run(*RUN, *poison([step - 1])))
    assert newest(tmp_path / "run") == tmp_path / f"run/checkpoints/step-{(step - 1) // 2 * 2:08d}"
    account = ledger.read(tmp_path / "run")
    assert account.steps[step]["loss"] == "nan"
    assert check(tmp_path / "run")[1]


def test_three_ways_to_do_without_a_batch_end_alike(compose_run: Compose, tmp_path: Path) -> None:
    """Skipped, gone back for, or left out from the beginning; without dropout, which a skipped batch has drawn."""
    settings = (*RUN, "model.dropout=0.0")
    for name, extra in {
        "known": left_out([4]),
        "skip": ["guard=skip", *poison([4])],
        "rollback": ["guard=rollback", "guard.window=1", *poison([4])],
    }.items():
        run(compose_run(*settings, *extra, f"run_dir={tmp_path / name}"))
    assert_same_end(tmp_path / "known", tmp_path / "skip")
    assert_same_end(tmp_path / "known", tmp_path / "rollback")
    assert rows(tmp_path / "known") == rows(tmp_path / "rollback")
    report, sound = check(tmp_path / "skip")
    assert sound
    assert "step 5 made no update: the gradient is not finite" in report
    assert "no update: the gradient is not finite" in show_step(tmp_path / "skip", 5)


@pytest.mark.parametrize(("batch", "window", "target"), [(5, 3, 2), (6, 2, 4), (1, 4, None)])
def test_rollback_goes_before_the_window_and_on_without_it(
    compose_run: Compose, tmp_path: Path, batch: int, window: int, target: int | None
) -> None:
    """A spike this time; dropout on: the run is the one that had known, to the bit."""
    batches = list(range(max(0, batch - window + 1), batch + 1))
    guard = ("guard=rollback", f"guard.window={window}", "guard.history=2", "guard.sigma=200")
    factor = "1e30" if batch > 1 else "null"  # before there is a history
    run(compose_run(*RUN, *guard, *poison([batch], factor), f"run_dir={tmp_path / 'back'}"))
    run(compose_run(*RUN, *guard, *left_out(batches), f"run_dir={tmp_path / 'known'}"))
    assert_same_end(tmp_path / "known", tmp_path / "back")
    assert rows(tmp_path / "known") == rows(tmp_path / "back")
    report, sound = check(tmp_path / "back")
    assert sound, report
    assert f": back to step {target or 0}, without batches {batches[0]} to {batch}" in report
    assert "step-00000008" in str(newest(tmp_path / "back"))


class Damage(Callback):
    """Cuts a file of a checkpoint, some steps later."""

    def __init__(self, checkpoint: int, step: int) -> None:
        self.checkpoint, self.step = checkpoint, step

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.strategy.finish_saving()  # type: ignore[attr-defined]
            step = Path(trainer.default_root_dir) / f"checkpoints/step-{self.checkpoint:08d}"
            file = next(step.glob("tensors-*.safetensors"))
            file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(("damaged", "target"), [(4, 2), (2, 4)])
def test_rollback_verifies_before_it_removes(compose_run: Compose, tmp_path: Path, damaged: int, target: int) -> None:
    """The one before is as good; where there is none, a later one has to do."""
    guard = ("guard=rollback", f"guard.window={2 if damaged == 4 else 4}", "callback.checkpoint.background=true")
    damage = f"+callback.damage={{_target_: tests.test_guard.Damage, checkpoint: {damaged}, step: 5}}"
    run(compose_run(*RUN, *guard, *poison([5]), damage))
    events = [event for event in ledger.read(tmp_path / "run").events if event["event"] == "rollback"]
    assert [event["step"] for event in events] == [target]


def test_attempts_are_counted(compose_run: Compose, tmp_path: Path) -> None:
    always, once = poison(list(range(3, 8))), "callback.checkpoint.every_n_train_steps=100"
    with pytest.raises(DivergedError, match=r"gone back to the start 2 times \(guard.attempts\)"):
        run(compose_run(*RUN, once, "guard=rollback", "guard.window=1", "guard.attempts=2", *always))
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 79
    with pytest.raises(DivergedError, match="steps 4 to 6 were skipped one after the other"):
        run(compose_run(*RUN, "guard=skip", "guard.in_a_row=3", *always, f"run_dir={tmp_path / 'skip'}"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_all_ranks_decide_alike(corpus: Path, cache_dir: Path, tmp_path: Path, strategy: str, policy: str) -> None:
    """One rank has the bad rows."""
    settings = [
        *RUN,
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        f"strategy={strategy}",
        "trainer.devices=2",
        "model.dropout=0.0",
        "~callback.sample",
    ]
    window = ["guard.window=1"] if policy == "rollback" else []
    bad = [f"guard={policy}", *window, *poison([4], rank=1), f"run_dir={tmp_path / 'bad'}"]
    run_on_ranks(run_composed, 2, [*settings, *bad])
    run_on_ranks(run_composed, 2, [*settings, *left_out([4]), f"run_dir={tmp_path / 'known'}"])
    assert_same_end(tmp_path / "known", tmp_path / "bad")
    assert check(tmp_path / "bad")[1]
