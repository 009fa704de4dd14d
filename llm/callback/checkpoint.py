"""Lightning's ModelCheckpoint, writing step directories from which a run continues exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from llm.checkpoint import step_name
from llm.checkpoint.rng import rng_state, set_rng_state


class Checkpoint(ModelCheckpoint):
    """All options are ModelCheckpoint's; the generators are saved too, and the last step of a run always is."""

    FILE_EXTENSION = ""  # a checkpoint is a directory, step-00001000

    _rng: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The generators' states, without which dropout would differ after a restart."""
        checkpoint["rng"] = rng_state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until everything that draws numbers while it is being set up has done so."""
        self._rng = checkpoint["rng"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning calls checkpoint callbacks last, so nothing draws between here and the first step."""
        super().on_train_start(trainer, pl_module)
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, if the interval did not."""
        super().on_train_end(trainer, pl_module)
        save_step(trainer)


def save_step(trainer: L.Trainer) -> Path:
    """Save the step the run is at, unless that is done already, and say where."""
    path = Path(trainer.default_root_dir) / "checkpoints" / step_name(trainer.global_step)
    if not path.exists():
        trainer.save_checkpoint(path)
    return path
