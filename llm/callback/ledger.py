"""What each step really consumed, written down."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm import ledger
from llm.data import TextData
from llm.objective import Objective
from llm.reduce import all_gather, all_sum


class Ledger(Callback):
    """`RUN/ledger.jsonl`: for every step the ids of the rows that all processes trained on, taken from the batches, and
    the loss; `python -m llm audit RUN` reads it.

    Args:
        every_n_steps: between two writes; ids and losses stay on the device until then. Before a checkpoint all is
            written, and synced.
    """

    def __init__(self, every_n_steps: Annotated[int, Gt(0)] = 10) -> None:
        self.every_n_steps = every_n_steps
        self._steps: list[tuple[int, int, Tensor, Tensor]] = []  # step, batch, ids of this process, (sum, count)
        self._chain: str | None = None  # where the checkpoint that the run goes on from had got to
        self._ledger: ledger.Ledger | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the run goes on."""
        self._steps = []
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextData)
        self._ledger = ledger.Ledger(trainer.default_root_dir)
        self._ledger.open()
        event = {
            "event": "resume" if trainer.global_step else "start",
            "step": trainer.global_step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": trainer.world_size,
            "data": data.fingerprint,
            "rows": data.n_rows,
        }
        self._ledger.append([event if self._chain is None else event | {"after": self._chain}])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step consumed."""
        assert isinstance(pl_module, Objective)
        samples = torch.cat([micro_batch["samples"] for micro_batch in batch.micro_batches])
        self._steps.append((trainer.global_step, batch.index, samples, torch.stack(pl_module.step_loss).double()))
        if trainer.global_step % self.every_n_steps == 0:
            self._write()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its place in the ledger."""
        self._write(sync=True)
        checkpoint["ledger"] = None if self._ledger is None else self._ledger.chain

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The other half."""
        self._chain = checkpoint.get("ledger")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is left."""
        self._write(sync=True)

    def _write(self, *, sync: bool = False) -> None:
        """One gathering for all steps since the last write; every process calls this."""
        if not self._steps:
            return
        mine = torch.stack([samples for _, _, samples, _ in self._steps])  # [steps, rows]
        samples = all_gather(mine).transpose(0, 1).flatten(1).tolist()  # [steps, processes x rows]
        losses = all_sum(torch.stack([loss for _, _, _, loss in self._steps])).tolist()
        steps, self._steps = self._steps, []
        if self._ledger is None:
            return
        lines = [
            {"step": step, "batch": batch, "samples": ledger.packed(ids), "loss": (total / max(count, 1.0)).hex()}
            for (step, batch, _, _), ids, (total, count) in zip(steps, samples, losses, strict=True)
        ]
        self._ledger.append(lines, sync=sync)
