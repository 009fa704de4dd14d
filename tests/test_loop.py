"""The lean way through a step does what Lightning's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from llm.build import build
from llm.loop import EpochLoop
from llm.run import run
from llm.strategy.hooks import Hooked
from tests.runs import Compose, saved

HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_epoch_end",
]


class Diary(Callback):
    """What was called, when, and as which hook `self.log` would have known it."""

    entries: ClassVar[list[tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in HOOKS:
            return super().__getattribute__(name)

        def note(trainer: L.Trainer, module: L.LightningModule, *arguments: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            where = (trainer.global_step, loop.batch_progress.current.__dict__.copy(), module._current_fx_name)
            kinds = [argument if isinstance(argument, int) else type(argument).__name__ for argument in arguments]
            Diary.entries.append((name, where, kinds))

        return note


NODE = ["+callback.diary={_target_: tests.test_loop.Diary}", "packages=[tests]", "callback.metrics.every_n_steps=1"]


@pytest.fixture
def diary() -> list[tuple[Any, ...]]:
    Diary.entries.clear()
    return Diary.entries


@pytest.mark.parametrize("way", ["profiler", "stock"])
def test_both_ways_are_the_same(
    compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diary: list[tuple[Any, ...]], way: str
) -> None:
    """Hooks, their order and arguments, counters, weights and everything saved, bit for bit."""
    run(compose_run(*NODE, f"run_dir={tmp_path / 'lean'}"))
    lean = list(diary)
    diary.clear()
    if way == "stock":
        monkeypatch.setattr(Hooked, "backward", Strategy.backward)
        monkeypatch.setattr(Hooked, "optimizer_step", Strategy.optimizer_step)
        monkeypatch.setattr(EpochLoop, "advance", EpochLoop.__base__.advance)  # type: ignore[union-attr]
    profiler = ["+trainer.profiler=simple"] if way == "profiler" else []
    run(compose_run(*NODE, *profiler, f"run_dir={tmp_path / 'other'}"))
    assert len(lean) > 6 * 6
    assert lean == diary
    one, other = saved(tmp_path / "lean"), saved(tmp_path / "other")
    assert one["objective"]["n_steps"] == other["objective"]["n_steps"] == 6
    for kind in ("state_dict", "optimizer"):
        torch.testing.assert_close(one[kind], other[kind], rtol=0, atol=0)


def test_a_callback_may_log(compose_run: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning's `self.log`, in a hook of every step: read by others, and reset with every epoch."""
    seen: list[float] = []

    def log(self: Any, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int) -> None:
        seen.append(float(trainer.callback_metrics.get("twice", -1.0)))
        self.log("twice", 2.0 * index, batch_size=1)

    monkeypatch.setattr(Diary, "on_train_batch_end", log, raising=False)
    monkeypatch.setattr(Diary, "__getattribute__", object.__getattribute__)
    run(compose_run(*NODE, "trainer.max_steps=4", "trainer.limit_val_batches=0"))
    assert seen == [-1.0, 0.0, 2.0, 4.0]


def test_a_callback_without_a_hook_is_not_asked(compose_run: Compose) -> None:
    """Of the tiny run's callbacks one looks at the beginning of a batch: the others cost nothing."""
    trainer, objective = build(compose_run())
    objective._trainer = trainer
    strategy = type("Any", (Hooked, SingleDeviceStrategy), {})(device="cpu")
    strategy._lightning_module = objective
    assert not strategy.hooks._hooks("on_before_zero_grad")
    assert {type(hook.func.__self__).__name__ for hook in strategy.hooks._hooks("on_train_batch_start")} == {"Metrics"}
