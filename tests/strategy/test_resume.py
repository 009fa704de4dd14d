"""A run of several ranks that is told to stop, by a signal to any one of them, goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from llm.callback import PreemptedError
from llm.checkpoint import newest, read
from tests.ranks import run_on_ranks
from tests.runs import run_composed
from tests.test_resume import rows

STRATEGIES = {
    "ddp": (2, ["strategy=ddp"]),
    "fsdp": (2, ["strategy=fsdp"]),
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


def preempted(overrides: list[str]) -> tuple[str, int]:
    try:
        run_composed(overrides)
    except PreemptedError as error:
        return str(error), error.exit_code
    raise AssertionError("was not preempted")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("ddp", "adamw"), ("ddp", "muon"), ("fsdp", "adamw"), ("fsdp", "muon"), ("hsdp+tp", "adamw")],
)
def test_preempted_run_equals_uninterrupted(
    name: str, optimizer: str, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """With dropout, off a flush, two micro-batches; told on the last rank only."""
    n, strategy = STRATEGIES[name]
    settings = [
        *strategy,
        f"optimizer={optimizer}",
        f"trainer.devices={n}",
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        "data.micro_batch_size=1",
        "trainer.max_steps=7",
        "callback.sample.prompts=[a]",
        "callback.sample.max_new_tokens=2",
        "packages=[tests]",
    ]
    run_on_ranks(run_composed, n, [*settings, f"run_dir={tmp_path / 'whole'}"])

    tell = f"+callback.signal={{_target_: tests.strategy.test_resume.SignalRank, rank: {n - 1}, step: 2}}"
    ends = run_on_ranks(preempted, n, [*settings, f"run_dir={tmp_path / 'run'}", tell])
    # The question whether anybody was told travels beside the next step.
    assert {code for _, code in ends} == {75}
    assert all("SIGTERM: saved" in text and "step-00000003" in text for text, _ in ends)
    run_on_ranks(run_composed, n, [*settings, f"run_dir={tmp_path / 'run'}"])

    one, two = (read(newest(tmp_path / run)) for run in ("whole", "run"))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(two["optimizer_states"][0]["state"], one["optimizer_states"][0]["state"], rtol=0, atol=0)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole"), "bit for bit, though 1e-6 is what is promised"
    samples = [(tmp_path / run / "samples.txt").read_text() for run in ("whole", "run")]
    assert samples[0] == samples[1]
    assert samples[0].count("==== step 7") == 1


def test_ranks_draw_their_own_dropout(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Else the same neurons would be off in all of them."""
    settings = ["strategy=ddp", "trainer.devices=2", f"data.path={corpus}", f"data.cache_dir={cache_dir}"]
    run_on_ranks(run_composed, 2, [*settings, f"run_dir={tmp_path}"])
    states = read(newest(tmp_path))["rng"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.mark.parametrize(
    ("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("hsdp+tp", "single"), ("single", "fsdp")]
)
def test_another_strategy_goes_on(before: str, after: str, corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Without dropout the losses are those of the run that was never moved."""
    strategies = {**STRATEGIES, "single": (1, ["strategy=single"])}

    def train(name: str, run: str, max_steps: int) -> None:
        n, strategy = strategies[name]
        settings = [
            *strategy,
            "model.dropout=0",
            "schedule=constant",
            "~callback.sample",
            f"trainer.devices={n}",
            f"trainer.max_steps={max_steps}",
            f"data.path={corpus}",
            f"data.cache_dir={cache_dir}",
            "data.micro_batch_size=1",
            f"run_dir={tmp_path / run}",
        ]
        if n == 1:
            run_composed(settings)
        else:
            run_on_ranks(run_composed, n, settings)

    train(after, "whole", 6)
    train(before, "moved", 3)
    train(after, "moved", 6)
    whole, moved = rows(tmp_path / "whole"), rows(tmp_path / "moved")
    losses = [[row["train/loss"] for row in run if "train/loss" in row and row["step"] > 4] for run in (whole, moved)]
    assert len(losses[0]) > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
