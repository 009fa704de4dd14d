"""Lightning's Trainer as its documentation has it: automatic optimisation, and `self.log` of five metrics every step.

`python -m benchmarks.contestants.stock SETTINGS.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.contestants.plain import LOG_EVERY, InMemory, Ours, adamw, load_steps
from benchmarks.turn import Turn


class Module(L.LightningModule):
    """Our model under the plain loss."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.network = Ours(settings)
        self.n_tokens = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.network(batch)
        self.n_tokens += batch["tokens"].numel()
        self.step_loss = loss.detach()
        self.log("train/loss", loss)
        self.log("tokens", float(self.n_tokens))
        self.log("lr", self.settings["adamw"]["lr"])
        self.log("perplexity", loss.detach().exp())
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log("grad_norm", nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> Optimizer:
        return adamw(self, self.settings)


class Report(Callback):
    """After every step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.turn = Turn()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        self.turn.after_step(pl_module.step_loss)
        trainer.should_stop = self.turn.done


def main(settings: dict[str, Any], n_steps: int) -> None:
    """Train, on batches that lie in memory."""
    steps = [step[0] for step in load_steps(settings["steps"])]
    trainer = L.Trainer(
        max_steps=n_steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=LOG_EVERY,
        gradient_clip_val=settings["clip_norm"],
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Report()],
    )
    trainer.fit(Module(settings), InMemory(steps))


if __name__ == "__main__":
    torch.manual_seed(0)
    given = json.loads(Path(sys.argv[1]).read_text())
    main(given, given["n_steps"])
