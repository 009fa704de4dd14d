"""What each step really consumed, written down."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import lightning as L
import torch
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm import ledger
from llm.data import TextData
from llm.objective import Objective
from llm.reduce import Sum, all_gather, all_sum


class Step(NamedTuple):
    """Its number, counted from 1, its batch, and why it made no update."""

    number: int
    batch: int
    skipped: str | None


class Ledger(Callback):
    """`RUN/ledger.jsonl`: for every step the ids of the rows that all processes trained on, taken from the batches, and
    the loss; `python -m llm audit RUN` reads it.

    Args:
        every_n_steps: between two writes; ids and losses stay on the device until then. Before a checkpoint all is
            written, and synced.
    """

    def __init__(self, every_n_steps: Annotated[int, Gt(0)] = 10) -> None:
        self.every_n_steps = every_n_steps
        # Ids of each micro-batch, and the loss's sum and count, of this process.
        self._steps: list[tuple[Step, list[Tensor], Sum]] = []
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
        assert isinstance(pl_module, Objective)
        back = pl_module.guard.gone_back
        event = {
            "event": "rollback" if back else "resume" if trainer.global_step else "start",
            "step": trainer.global_step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": trainer.world_size,
            "data": data.fingerprint,
            "rows": data.n_rows,
        } | ({} if back is None else {"cause": back.cause, "found": back.step, "left_out": [back.first, back.last]})
        self._ledger.append([event if self._chain is None else event | {"after": self._chain}])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step consumed."""
        assert isinstance(pl_module, Objective)
        samples = [micro_batch["samples"] for micro_batch in batch.micro_batches]
        step = Step(trainer.global_step, batch.index, pl_module.skipped)
        self._steps.append((step, samples, pl_module.step_loss))
        if trainer.global_step % self.every_n_steps == 0 or pl_module.trouble is not None:
            self._write()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its place in the ledger."""
        self._write(sync=True)
        checkpoint["ledger"] = None if self._ledger is None else self._ledger.chain

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The other half."""
        self._chain = checkpoint.get("ledger")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is left."""
        self._write(sync=True)

    def _write(self, *, sync: bool = False) -> None:
        """One gathering for all steps since the last write; every process calls this."""
        if not self._steps:
            return
        mine = torch.cat([ids for _, samples, _ in self._steps for ids in samples]).view(len(self._steps), -1)
        samples = all_gather(mine).transpose(0, 1).flatten(1).tolist()  # [steps, processes x rows]
        totals = torch.stack([total for *_, (total, _) in self._steps]).double()
        counts = totals.new_tensor([float(count) for *_, (_, count) in self._steps])
        losses = all_sum(torch.stack((totals, counts), dim=1)).tolist()
        steps, self._steps = self._steps, []
        if self._ledger is None:
            return
        lines = [
            {"step": step.number, "batch": step.batch, "samples": ledger.packed(ids), "loss": _mean(total, count)}
            | ({} if step.skipped is None else {"skipped": step.skipped})
            for (step, _, _), ids, (total, count) in zip(steps, samples, losses, strict=True)
        ]
        self._ledger.append(lines, sync=sync)


def _mean(total: float, count: float) -> str | None:
    """Exactly; None of nothing, as in a step that was left out."""
    return (total / count).hex() if count else None
