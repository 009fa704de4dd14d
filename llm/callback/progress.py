"""A live line for people, plain lines for log files."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from llm.callback.metrics import metrics_of


class Progress(ProgressBar):
    """Step, loss, tokens/s and time left. The numbers are those of the newest flush: drawing them costs no host sync.

    On a terminal this is a live bar; elsewhere (a SLURM log) every flush prints one line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._row: dict[str, float] = {}
        self._shown = True
        self._start_s = 0.0
        self._start_step = 0

    def disable(self) -> None:
        """Lightning silences all processes but the first."""
        self._shown = False

    def enable(self) -> None:
        """The other half of `disable`."""
        self._shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar."""
        self._start_s, self._start_step = time.monotonic(), trainer.global_step
        if not (self._shown and self._console.is_terminal):
            return
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task(
            "", total=trainer.max_steps, completed=trainer.global_step, numbers="starting", left=""
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on; show the numbers when there are new ones."""
        metrics = metrics_of(trainer)
        if metrics is not None and metrics.row and metrics.row is not self._row:
            self._row = metrics.row
            self._show_row(trainer)
        elif self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation result above the bar."""
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values and not trainer.sanity_checking:
            self._print(f"step {trainer.global_step}  " + "  ".join(f"{n} {float(v):.4f}" for n, v in values.items()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the full bar standing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, left="")
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own messages, above the bar."""
        self._print(" ".join(str(arg) for arg in args))

    def _show_row(self, trainer: L.Trainer) -> None:
        loss = self._row.get("train/loss", float("nan"))
        numbers = f"loss {loss:.3f}  {self._row.get('speed/tokens_per_s', 0):,.0f} tokens/s"
        if "speed/mfu" in self._row:
            numbers += f"  MFU {self._row['speed/mfu']:.1%}"
        left = f"{self._time_left(trainer)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, numbers=numbers, left=left)
        else:
            self._print(f"step {trainer.global_step}/{trainer.max_steps}  {numbers}  {left}")

    def _time_left(self, trainer: L.Trainer) -> str:
        """From the pace since the start of this process, validation included."""
        done = trainer.global_step - self._start_step
        seconds = (time.monotonic() - self._start_s) / max(1, done) * (trainer.max_steps - trainer.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def _print(self, line: str) -> None:
        if not self._shown:
            return
        if self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)  # the same, without a console's detours

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
