"""The one place where numbers leave the device: every N steps, in one copy, to the run's own file and all loggers."""

from __future__ import annotations

import time
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback

from llm.callback.loggers import tell
from llm.callback.record import Record
from llm.hardware import gpu_named
from llm.metric import model_flops_utilisation
from llm.objective import Objective


class Metrics(Callback):
    """Flush the objective's packed sums, add the speed, and write a row.

    `metrics.jsonl` gets one row a flush and one a validation, each with `step` and `tokens` (real tokens read so far).
    `train/loss` is the token-weighted mean since the row before; `grad/norm` the mean over the same steps, before
    clipping.

    Args:
        every_n_steps: the one flush interval. Between flushes there is no host sync.
    """

    def __init__(self, every_n_steps: Annotated[int, Gt(0)] = 10) -> None:
        self.every_n_steps = every_n_steps
        self.tokens = 0  # read by the run so far
        self.train_s = 0.0  # spent in training steps, without validation, sampling and start-up
        self.row: dict[str, float] = {}  # the newest training row
        self._clock: float | None = None  # when the open interval began; None while the run does something else
        self._interval_s = 0.0
        self._lengths = (0, 0)  # of a row: tokens read, and of an encoder-decoder tokens written

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run forgets the rows that come after the checkpoint it goes on from."""
        if trainer.is_global_zero:
            Record.of(trainer).rewind(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, at the first step and after every pause."""
        rows = batch.micro_batches[0]
        sides = [rows[side].shape[1] for side in ("source_tokens", "tokens") if side in rows]
        self._lengths = (sides[0], sum(sides[1:]))
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock until the next training step."""
        self._pause()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Flush on every N-th step."""
        if trainer.global_step % self.every_n_steps == 0:
            self.flush(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The steps since the last flush, then the CSV copy of all rows."""
        self.flush(trainer, pl_module)
        if trainer.is_global_zero:
            Record.of(trainer).export_csv()

    def flush(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a row of everything since the one before."""
        assert isinstance(pl_module, Objective)
        totals = pl_module.train_totals.reduce()  # the host waits for the device here, so the clock is honest
        if not totals:
            return
        if self._clock is not None:
            self._pause()
            self._clock = time.perf_counter()  # at once: fetching the next batch belongs to the next interval
        n_tokens, _ = totals.pop("n_tokens")
        norm, n_steps = totals.pop("grad_norm")
        self.tokens += int(n_tokens)
        self.train_s += self._interval_s
        self.row = {
            **{f"train/{name}": mean for name, mean in pl_module.means(totals).items()},
            "grad/norm": norm / n_steps,
            "lr": pl_module.lr,
            **self._speed(trainer, pl_module, n_tokens, totals["loss"][1]),
        }
        self._interval_s = 0.0
        self._write(trainer, self.tokens, self.row)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A row of the validation metrics."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values and not trainer.sanity_checking:
            assert isinstance(pl_module, Objective)
            self._write(trainer, self.tokens + int(pl_module.train_totals.peek("n_tokens")), values)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting."""
        return {"tokens": self.tokens, "train_s": self.train_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other half of `state_dict`."""
        self.tokens, self.train_s = state_dict["tokens"], state_dict["train_s"]

    def _pause(self) -> None:
        if self._clock is not None:
            self._interval_s += time.perf_counter() - self._clock
            self._clock = None

    def _speed(self, trainer: L.Trainer, objective: Objective, n_tokens: float, n_predicted: float) -> dict[str, float]:
        """Tokens per second of the whole run, and the share of the devices' peak where that is known."""
        if self._interval_s <= 0:
            return {}
        tokens_per_s = n_tokens / self._interval_s
        device = objective.device
        gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if gpu is None:
            return {"speed/tokens_per_s": tokens_per_s}
        flops = objective.network.flops_per_token(*self._lengths, n_predicted / max(1.0, n_tokens))
        mfu = model_flops_utilisation(tokens_per_s / trainer.world_size, flops, gpu.peak_flops)
        return {"speed/tokens_per_s": tokens_per_s, "speed/mfu": mfu}

    def _write(self, trainer: L.Trainer, tokens: int, values: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        row: dict[str, float | None] = {"step": trainer.global_step, "tokens": tokens, **values}
        Record.of(trainer).append(row)
        shown, step = {"tokens": tokens, **values}, trainer.global_step
        tell(trainer, lambda logger: logger.log_metrics(shown, step=step))


def metrics_of(trainer: L.Trainer) -> Metrics | None:
    """The run's Metrics callback, for those that show its newest row."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Metrics)), None)
