"""Lightning's ModelCheckpoint, writing step directories from which a run continues exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
from annotated_types import Ge, Gt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from llm.checkpoint import step_name, steps
from llm.checkpoint.rng import rng_state, set_rng_state
from llm.reduce import gather_objects


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint over `RUN/checkpoints/step-…`, with the generators; the last step of a run is always saved.

    Args:
        every_n_train_steps: optimizer steps between checkpoints.
        save_top_k: how many to keep, -1 for all; the newest is kept in any case, as the run continues from it.
        monitor: what to keep the best of: "step", which keeps the newest, or a metric such as val/loss.
        mode: whether the best is the largest ("max") or the smallest ("min").
        keep_every_n_steps: of these steps the checkpoints stay for good; null: of none.
        background: training goes on while a thread writes; at most one save is under way.
        on_error: what a full or broken disk means: the end of the run (exit code 74), or a warning.
    """

    FILE_EXTENSION = ""  # a checkpoint is a directory

    def __init__(
        self,
        every_n_train_steps: Annotated[int, Gt(0)],
        save_top_k: Annotated[int, Ge(-1)] = 1,
        monitor: str = "step",
        mode: Literal["min", "max"] = "max",
        keep_every_n_steps: Annotated[int, Gt(0)] | None = None,
        background: bool = False,
        on_error: Literal["stop", "warn"] = "stop",
    ) -> None:
        super().__init__(
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=save_top_k,
            monitor=monitor,
            mode=mode,
        )
        self.keep_every_n_steps = keep_every_n_steps
        self.background = background
        self.on_error: Literal["stop", "warn"] = on_error
        self._rng: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """What is best stays so when a run goes on with another interval."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Which are best, of those that are there: by their names, as the run may have moved since."""
        there = {Path(path).name: score for path, score in state_dict["best_k_models"].items()}
        folder = Path(str(self.dirpath))
        best = {str(folder / name): score for name, score in there.items() if (folder / name).exists()}
        worst = (min if self.mode == "max" else max)(best, key=lambda path: float(best[path]), default="")
        kth = {"kth_best_model_path": worst, "kth_value": best.get(worst, state_dict["kth_value"])}
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "best_k_models": best, **kth})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Where a run looks for its checkpoints; Lightning would take the first logger's folder."""
        self.dirpath = str(_folder(trainer))
        strategy: Any = trainer.strategy  # one of ours
        strategy.background, strategy.on_error = self.background, self.on_error
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The generators' states, without which dropout would differ after a restart: one of every share of the data.

        Processes that share their data (tensor parallelism) draw the same, and have to.
        """
        states = gather_objects(rng_state())
        checkpoint["rng"] = states[:: len(states) // self._share(trainer)["num_replicas"]]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state until everything that draws numbers while it is being set up has done so.

        A process that had no part in the run before goes on with its own.
        """
        states, mine = checkpoint["rng"], self._share(trainer)["rank"]
        self._rng = states[mine] if mine < len(states) else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning calls checkpoint callbacks last, so nothing draws between here and the first step."""
        super().on_train_start(trainer, pl_module)
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on every N-th step, then drop what that has made superfluous. The newest is saved, be it among the best
        or not, and be it known or not: what is monitored may be measured later than the first save is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step % self._every_n_train_steps == 0:
            if self._last_global_step_saved != trainer.global_step and not self._saved_by_validation(trainer):
                self._defer_save_until_validation = False
                trainer.save_checkpoint(_folder(trainer) / step_name(trainer.global_step))
            self._prune(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Whether what is monitored is measured.

        Raises:
            MisconfigurationException: naming what is.
        """
        measured = sorted(trainer.callback_metrics)
        if not trainer.sanity_checking and self.monitor not in ("step", *measured):
            raise MisconfigurationException(
                f"callback.checkpoint.monitor: {self.monitor} - is not measured - take step or one of "
                f"{', '.join(measured)}"
            )
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The end of the run: save before the callbacks that sum it up, any of which may fail."""
        super().on_train_epoch_end(trainer, pl_module)
        save_step(trainer)  # waits for what a thread still writes, too
        self._prune(trainer)

    def _saved_by_validation(self, trainer: L.Trainer) -> bool:
        """Whether what is monitored is first measured now, behind this step, and the save waits for that."""
        interval = trainer.val_check_batch
        now = trainer.enable_validation and isinstance(interval, int) and trainer.global_step % interval == 0
        return self._defer_save_until_validation and now

    def _share(self, trainer: L.Trainer) -> dict[str, int]:
        return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

    def _prune(self, trainer: L.Trainer) -> None:
        """Remove the checkpoints of interruptions, which ModelCheckpoint does not know, when there is a newer one."""
        if self.save_top_k == -1 or not trainer.is_global_zero:
            return
        found = steps(trainer.default_root_dir)
        newest = found[-max(1, self.save_top_k) :] if self.monitor == "step" else found[-1:]
        best = set() if self.monitor == "step" else {Path(path) for path in self.best_k_models}
        for path in found:
            if path not in newest and path not in best:
                self._remove_checkpoint(trainer, str(path))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        step = int(Path(filepath).name.removeprefix("step-"))
        if self.keep_every_n_steps is None or step % self.keep_every_n_steps:
            super()._remove_checkpoint(trainer, filepath)


def save_step(trainer: L.Trainer) -> Path:
    """Save the step the run is at, unless that is done already, and say where."""
    path = _folder(trainer) / step_name(trainer.global_step)
    strategy: Any = trainer.strategy  # one of ours
    strategy.finish_saving()
    if not strategy.broadcast(path.exists()):  # the first process decides: each sees the disk at another moment
        trainer.save_checkpoint(path)
        strategy.finish_saving()
    return path


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
