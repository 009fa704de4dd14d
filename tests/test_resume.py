"""A run that was stopped and goes on is the run that was not stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback

from llm.checkpoint import newest
from llm.run import run
from llm.signals import PreemptedError
from tests.runs import FAMILIES, Compose, rows, saved


class Signal(Callback):
    """Sends this process a signal, as a cluster would, in a hook of Lightning's when `step` is the last step or the one
    being made."""

    def __init__(self, step: int, number: int = signal.SIGTERM, hook: str = "on_train_batch_start") -> None:
        self.step = step - (hook == "on_train_batch_start")

        def tell(trainer: L.Trainer, *arguments: Any) -> None:
            if trainer.global_step == self.step:
                os.kill(os.getpid(), number)

        setattr(self, hook, tell)


def assert_same_state(first: Path, second: Path) -> None:
    """Weights, optimizer and generators, bit for bit."""
    one, two = saved(first), saved(second)
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"], two["optimizer"], rtol=0, atol=0)
    assert len(one["optimizer"]) > 0
    assert torch.equal(one["rng"][0]["torch"], two["rng"][0]["torch"])
    assert one["rng"][0]["python"] == two["rng"][0]["python"]
    assert one["objective"]["n_batches"] == two["objective"]["n_batches"] > 0


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Path]:
    """Optimizer -> the run that nothing stopped."""
    return {}


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_preempted_run_equals_uninterrupted(
    compose_run: Compose,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole_runs: dict[str, Path],
    stop: int,
    optimizer: str,
) -> None:
    """Stopped on and off a flush (every 2) and a validation (every 3); dropout on, two micro-batches, fp32."""
    if optimizer not in whole_runs:
        whole_runs[optimizer] = tmp_path_factory.mktemp(optimizer)
        run(compose_run(f"optimizer={optimizer}", f"run_dir={whole_runs[optimizer]}"))
    signalled = f"+callback.signal={{_target_: tests.test_resume.Signal, step: {stop}}}"
    with pytest.raises(PreemptedError, match=rf"SIGTERM: saved .*step-0000000{stop}") as stopped:
        run(compose_run(f"optimizer={optimizer}", signalled, "packages=[tests]"))
    assert stopped.value.exit_code == 75
    run(compose_run(f"optimizer={optimizer}"))
    assert_same_state(whole_runs[optimizer], tmp_path / "run")
    assert rows(whole_runs[optimizer]) == rows(tmp_path / "run")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_rounding_does_not_matter(compose_run: Compose, tmp_path: Path, precision: str) -> None:
    """Bit for bit in bfloat16, too."""
    settings = (f"trainer.precision={precision}", "trainer.max_steps=4")
    run(compose_run(*settings, f"run_dir={tmp_path / 'whole'}"))
    with pytest.raises(PreemptedError):
        run(
            compose_run(*settings, "+callback.signal={_target_: tests.test_resume.Signal, step: 2}", "packages=[tests]")
        )
    run(compose_run(*settings))
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_go_on_with_the_noise_that_was_due(compose_run: Compose, tmp_path: Path, family: str) -> None:
    """Which tokens are hidden, or cut out, in step 4 does not depend on having seen steps 1 to 3."""
    settings = (*FAMILIES[family], "data.max_length=48", "data.val_every=5")
    run(compose_run(*settings, f"run_dir={tmp_path / 'whole'}"))
    with pytest.raises(PreemptedError):
        run(
            compose_run(*settings, "+callback.signal={_target_: tests.test_resume.Signal, step: 3}", "packages=[tests]")
        )
    run(compose_run(*settings))
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_preempted_with_loader_workers_equals_uninterrupted(compose_run: Compose, tmp_path: Path) -> None:
    """Two processes read ahead: what they had prepared for the steps that never came is prepared again."""
    workers = ("data.num_workers=2", "trainer.max_steps=4")
    run(compose_run(*workers, f"run_dir={tmp_path / 'whole'}"))
    with pytest.raises(PreemptedError):
        run(compose_run(*workers, "+callback.signal={_target_: tests.test_resume.Signal, step: 2}", "packages=[tests]"))
    run(compose_run(*workers))
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


class Crash(Callback):
    """Before anything is saved."""

    def on_train_batch_end(self, *arguments: object) -> None:
        raise RuntimeError("crash")


def test_wandb_sees_one_run(compose_run: Compose, tmp_path: Path) -> None:
    """Of an attempt that saved nothing, one that did, and the last."""
    with pytest.raises(RuntimeError, match="crash"):
        run(compose_run("logger=default", "+callback.crash={_target_: tests.test_resume.Crash}", "packages=[tests]"))
    wandb.finish()  # as the end of the process does
    with pytest.raises(PreemptedError):
        run(
            compose_run(
                "logger=default", "+callback.signal={_target_: tests.test_resume.Signal, step: 2}", "packages=[tests]"
            )
        )
    run(compose_run("logger=default"))
    # offline-run-DATE_TIME-ID, and behind it a number where two begin within a second.
    ids = [path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(ids) > 1
    assert set(ids) == {(tmp_path / "run" / "wandb" / "id").read_text()}


@pytest.mark.parametrize(
    ("number", "hook", "step", "saved_step"),
    [
        (signal.SIGUSR2, "on_fit_start", 0, 1),  # before the first step: it is saved after it
        (signal.SIGUSR1, "on_save_checkpoint", 2, 3),
        (signal.SIGHUP, "on_validation_batch_start", 3, 3),
        (signal.SIGUSR2, "on_validation_end", 6, 6),  # the last one: nothing is left to be trained
        (signal.SIGTERM, "on_train_end", 6, 6),
    ],
)
def test_told_at_any_moment_nothing_is_lost(
    compose_run: Compose,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole_runs: dict[str, Path],
    number: int,
    hook: str,
    step: int,
    saved_step: int,
) -> None:
    """Not the end of the run either, which the next start makes up for: last validation, curves, summary."""
    saving = "callback.checkpoint.every_n_train_steps=2"
    if "saving" not in whole_runs:
        whole_runs["saving"] = tmp_path_factory.mktemp("saving")
        run(compose_run(saving, f"run_dir={whole_runs['saving']}"))
    told = f"{{_target_: tests.test_resume.Signal, step: {step}, number: {int(number)}, hook: {hook}}}"
    with pytest.raises(PreemptedError, match=rf"{signal.Signals(number).name}: .*saved"):
        run(compose_run(saving, f"+callback.signal={told}", "packages=[tests]"))
    assert newest(tmp_path / "run") == tmp_path / f"run/checkpoints/step-0000000{saved_step}"
    run(compose_run(saving))
    assert_same_state(whole_runs["saving"], tmp_path / "run")
    assert rows(whole_runs["saving"]) == rows(tmp_path / "run")
    for name in ("summary.json", "loss.png", "metrics.csv", "samples.txt"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run/samples.txt").read_text() == (whole_runs["saving"] / "samples.txt").read_text()
