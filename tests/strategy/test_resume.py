"""A run of several ranks that is told to stop, by a signal to any one of them, goes on as if nothing had been."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from llm import ledger
from llm.signals import PreemptedError
from llm.strategy import FSDP
from tests.ranks import run_on_ranks
from tests.runs import composed, rows, run_composed, run_registered, run_together, saved

STRATEGIES = {
    "ddp": (2, ["strategy=ddp"]),
    "ddp x4": (4, ["strategy=ddp"]),  # the order of a sum of two makes no difference
    "fsdp": (2, ["strategy=fsdp"]),
    "fsdp bf16": (2, ["strategy=fsdp", "trainer.precision=bf16-mixed"]),
    "hsdp+tp": (4, ["strategy=fsdp", "strategy.replicate_size=2", "strategy.tensor_parallel_size=2"]),
}


class SignalRank(Callback):
    """Sends one rank SIGTERM during step `step`."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(cfg: DictConfig) -> tuple[str, int]:
    try:
        run_registered(cfg)
    except PreemptedError as error:
        return str(error), error.exit_code
    raise AssertionError("was not preempted")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("ddp", "muon"),
        ("ddp x4", "adamw"),
        ("fsdp", "adamw"),
        ("fsdp bf16", "muon"),
        ("hsdp+tp", "adamw"),
    ],
)
def test_preempted_run_equals_uninterrupted(
    name: str, optimizer: str, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """With dropout, off a flush, two micro-batches; told on the last rank only."""
    n, strategy = STRATEGIES[name]
    n_shares = n // 2 if name == "hsdp+tp" else n
    settings = [
        *strategy,
        f"optimizer={optimizer}",
        f"trainer.devices={n}",
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        f"data.micro_batch_size={8 // n_shares // 2}",
        "trainer.max_steps=5",
        "~callback.summary",
        "callback.sample.prompts=[a]",
        "callback.sample.max_new_tokens=2",
        "packages=[tests]",
    ]
    run_together(n, [*settings, f"run_dir={tmp_path / 'whole'}"])

    tell = f"+callback.signal={{_target_: tests.strategy.test_resume.SignalRank, rank: {n - 1}, step: 2}}"
    ends = run_on_ranks(preempted, n, composed([*settings, f"run_dir={tmp_path / 'run'}", tell]))
    # The question whether anybody was told travels beside the next step.
    assert {code for _, code in ends} == {75}
    assert all("SIGTERM: saved" in text and "step-00000003" in text for text, _ in ends)
    run_together(n, [*settings, f"run_dir={tmp_path / 'run'}"])

    one, two = (saved(tmp_path / run) for run in ("whole", "run"))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(two["optimizer"], one["optimizer"], rtol=0, atol=0)
    assert len(one["optimizer"]) > 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole"), "bit for bit, though 1e-6 is what is promised"
    samples = [(tmp_path / run / "samples.txt").read_text() for run in ("whole", "run")]
    assert samples[0] == samples[1]
    assert samples[0].count("==== step 5") == 1


def test_ranks_draw_their_own_dropout(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Else the same neurons would be off in all of them."""
    settings = ["strategy=ddp", "trainer.devices=2", f"data.path={corpus}", f"data.cache_dir={cache_dir}"]
    run_together(2, [*settings, "trainer.max_steps=3", "~callback.summary", f"run_dir={tmp_path}"])
    states = saved(tmp_path)["rng"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


WORLDS = {
    "single": (1, ["strategy=single"]),
    "ddp2": (2, ["strategy=ddp"]),
    "ddp3": (3, ["strategy=ddp"]),
    "fsdp2": (2, ["strategy=fsdp"]),
    "fsdp3": (3, ["strategy=fsdp"]),
    "hsdp+tp": STRATEGIES["hsdp+tp"],
}


@pytest.fixture(scope="module")
def train_in(corpus: Path, cache_dir: Path) -> Callable[..., None]:
    """`train_in(world, run_dir, max_steps, …)`: without dropout, which every process draws for itself, and with two
    micro-batches, of another size where there is another number of shares."""

    def train(name: str, run_dir: Path, max_steps: int, *extra: str) -> None:
        n, strategy = WORLDS[name]
        n_shares = n // 2 if name == "hsdp+tp" else n
        settings = [
            *strategy,
            "model.dropout=0",
            "schedule=constant",
            "schedule.warmup_steps=0",
            "~callback.sample",
            "~callback.summary",
            f"trainer.devices={n}",
            f"trainer.max_steps={max_steps}",
            f"data.path={corpus}",
            f"data.cache_dir={cache_dir}",
            "data.batch_size=12",
            f"data.micro_batch_size={12 // n_shares // 2}",
            f"run_dir={run_dir}",
            *extra,
        ]
        run_together(n, settings)

    return train


@pytest.fixture(scope="module")
def unmoved(train_in: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("unmoved")
    train_in("single", run_dir, 4)
    return run_dir


@pytest.fixture(scope="module")
def left(train_in: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`left(world)`: the run directory that two steps in that world leave behind, made once."""
    folder = tmp_path_factory.mktemp("left")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            train_in(name, folder / name, 2)
        return folder / name

    return made


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "ddp2"),
        ("single", "fsdp2"),
        ("ddp2", "single"),
        ("ddp2", "ddp3"),
        ("ddp2", "fsdp2"),
        ("fsdp2", "ddp2"),
        ("fsdp2", "fsdp3"),
        ("ddp3", "ddp2"),
        ("fsdp3", "fsdp2"),
        ("hsdp+tp", "single"),
    ],
)
def test_another_world_goes_on(
    before: str,
    after: str,
    train_in: Callable[..., None],
    left: Callable[[str], Path],
    unmoved: Path,
    tmp_path: Path,
) -> None:
    """The loaded weights to the bit, the same batches in the same order, and the losses of the run that never moved."""
    shutil.copytree(left(before), tmp_path, dirs_exist_ok=True)
    step = saved(tmp_path)
    train_in(after, tmp_path, 4, "+callback.rehearsal={_target_: llm.callback.Rehearsal, fault: none}")
    loaded = saved(tmp_path / "loaded")
    torch.testing.assert_close(loaded["state_dict"], step["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["optimizer"], step["optimizer"], rtol=0, atol=0)
    assert len(step["optimizer"]) > 0
    one, two = ledger.read(unmoved), ledger.read(tmp_path)
    assert [two.steps[n]["samples"] for n in range(1, 5)] == [one.steps[n]["samples"] for n in range(1, 5)]
    losses = [[float.fromhex(account.steps[n]["loss"]) for n in range(1, 5)] for account in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class Drawing(Callback):
    """Writes down, before each step, the state of the rank's generator, and the timeouts of its groups."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(trainer.strategy, FSDP)
        groups = trainer.strategy.device_mesh.get_all_groups()
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        with open(Path(self.folder) / f"rank{trainer.global_rank}", "a") as file:
            file.write(f"{state} {timeouts}\n")


def test_ranks_with_the_same_data_draw_the_same_dropout(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Also after a run of one process, whose generator has no heir but the first share of the data."""
    places = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}"]
    settings = [*places, "~callback.sample", "~callback.summary"]
    run_composed([*settings, "schedule=constant", "trainer.max_steps=2", "schedule.warmup_steps=0"])
    tensor = ["strategy=fsdp", "strategy.tensor_parallel_size=2", "trainer.devices=4", "strategy.timeout_s=77"]
    watch = f"+callback.drawing={{_target_: tests.strategy.test_resume.Drawing, folder: {tmp_path}}}"
    more = ["schedule=constant", "trainer.max_steps=4", "schedule.warmup_steps=0", "data.micro_batch_size=2"]
    run_together(4, [*settings, *tensor, *more, watch, "packages=[tests]"])
    drawn = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(4)]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert len(drawn[0]) == 2
    assert all(line.endswith("[77.0, 77.0, 77.0]") for line in drawn[0]), "strategy.timeout_s holds for every axis"
