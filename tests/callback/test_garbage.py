"""Python's garbage collector stands still while a run trains, but for the steps that are said."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from llm.run import run
from tests.runs import Compose


class Collections(Callback):
    """At which steps the collector ran, and how thoroughly; whether it was on."""

    found: ClassVar[list[tuple[int, int]]] = []
    enabled: ClassVar[list[bool]] = []
    trainer: ClassVar[L.Trainer | None] = None
    raises_at: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        Collections.trainer = trainer
        Collections.enabled.append(gc.isenabled())
        if trainer.global_step == Collections.raises_at:
            raise RuntimeError("on purpose")


def note(phase: str, information: dict[str, int]) -> None:
    trainer = Collections.trainer
    if phase == "start" and trainer is not None and trainer.training:
        Collections.found.append((trainer.global_step, information["generation"]))


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("llm.callback.garbage.gc", gc)  # tests.lean has put another there
    Collections.found, Collections.enabled, Collections.trainer, Collections.raises_at = [], [], None, None
    gc.callbacks.append(note)
    yield
    gc.callbacks.remove(note)


NODE = ["+callback.collections={_target_: tests.callback.test_garbage.Collections}", "packages=[tests]"]


def test_it_runs_at_the_steps_that_are_said(compose_run: Compose) -> None:
    run(compose_run(*NODE, "callback.garbage.every_n_steps=2", "trainer.limit_val_batches=0", "~callback.sample"))
    assert [step for step, generation in Collections.found if generation == 1 and step < 6] == [2, 4]
    assert not [step for step, generation in Collections.found if generation == 0 and step < 6]
    assert Collections.enabled == [False] * 6
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_that_fails_gives_it_back(compose_run: Compose) -> None:
    Collections.raises_at = 2
    with pytest.raises(RuntimeError, match="on purpose"):
        run(compose_run(*NODE))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_has_turned_it_off_is_not_overruled(compose_run: Compose) -> None:
    gc.disable()
    try:
        run(compose_run(*NODE, "trainer.max_steps=3"))
        assert not gc.isenabled()
    finally:
        gc.enable()
