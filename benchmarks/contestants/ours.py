"""The project itself: python train.py, as a user starts it, with all default callbacks.

Two things are added: a callback that reports, and, where a contest is about the loop alone or about batches that the
project's data does not make, a data module that reads prepared steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.contest import Contestant
from benchmarks.contestants.plain import InMemory, device_figures
from benchmarks.machine import ROOT
from benchmarks.material import n_real
from benchmarks.turn import Turn
from llm.data import TextData
from llm.data.collate import Step
from llm.objective import Objective

STEPS = "BENCHMARK_STEPS"  # the file of prepared steps


class TakeTurns(Callback):
    """Reports the losses and the rounds, after all other callbacks of a step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._turn = Turn(trainer.global_rank, *device_figures(pl_module.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Objective)
        checked = trainer.global_step <= self._turn.pace.checked
        total, count = pl_module.step_loss
        self._turn.after_step((total / count).detach() if checked else None)
        if self._turn.done:
            trainer.should_stop = True  # a later start of a contest may have fewer rounds


class Prepared(TextData):
    """The steps of a file, in their order: each process its rows of each. Everything else is as ever."""

    def train_dataloader(self) -> InMemory:  # type: ignore[override]
        rank, world_size = self._place()
        loaded = torch.load(os.environ[STEPS], weights_only=True)
        shares = [[_share(batch, rank, world_size) for batch in step] for step in loaded]
        steps = [Step(i, share, int(n)) for i, (share, n) in enumerate(zip(shares, n_real(shares), strict=True))]
        # As the data loader does it: from page-locked memory a copy to the device is waited for by nobody.
        return InMemory([step.pin_memory() for step in steps] if torch.cuda.is_available() else steps)


def _share(batch: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    rows = len(batch["tokens"]) // world_size
    mine = {name: value[rank * rows : (rank + 1) * rows] for name, value in batch.items()}
    # The ledger wants as many samples in every step; made-up batches are none of the data's.
    return mine if "samples" in mine else mine | {"samples": torch.zeros(1, dtype=torch.long)}


def ours(
    name: str,
    overrides: Sequence[str],
    n_steps: int,
    weights: Path | None,
    *,
    steps: Path | None = None,
    every: bool = True,
    loggers: bool = False,
    checkpoints: bool = False,
    **options: Any,
) -> Contestant:
    """Contestant `name`: train.py with `overrides`, for `n_steps` at most.

    Args:
        weights: what `material.save_weights` wrote.
        steps: prepared ones to train on; None: those of its own data.
        every: all default callbacks; False: none, for what the loop alone takes.
        loggers: W&B and TensorBoard too; without them a run's metrics are in its own files, as those of others are.
        checkpoints: as many as by default; False: none, not even of the last step.
    """
    reporting = ["packages=[benchmarks]", "+callback.turn={_target_: benchmarks.contestants.ours.TakeTurns}"]
    # Whoever waits for its turn is not hung; checkpoints and samples are no part of what is compared.
    apart = ["callback.watchdog.floor_s=36000", "callback.sample.prompts=[]"]
    apart += [] if checkpoints else ["~callback.checkpoint"]
    settings = [
        *overrides,
        *(apart if every else ["callback=none"]),
        *([] if loggers else ["logger=none"]),
        *([] if steps is None else ["data._target_=benchmarks.contestants.ours.Prepared"]),
        *([] if weights is None else [f"init_from={weights / 'step-0'}"]),
        *reporting,
        "run_dir=run",
    ]
    environment = options.pop("environment", {}) | ({} if steps is None else {STEPS: str(steps)})
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    return Contestant(name, command, environment={**environment, "WANDB_MODE": "offline"}, **options)
