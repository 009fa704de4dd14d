"""Hung steps are told from long ones, the late rank is named, and all stacks are written."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch.distributed
from lightning.pytorch.callbacks import Callback

from llm.callback import Watchdog
from llm.guard import RollBackError, Window
from llm.watch import sidecar
from llm.watch.heart import Heart, Pulse, path_of, read
from llm.watch.judge import Judge, Seen, late
from tests.ranks import RankError, run_on_ranks
from tests.runs import run_composed

POLL_S = 0.25


def test_a_heart_is_read_from_outside(tmp_path: Path) -> None:
    assert read(path_of(tmp_path, 3)) is None
    heart = Heart(tmp_path / "new", 3)
    assert read(path_of(tmp_path / "new", 3)) == (os.getpid(), False, 0, 0)
    heart.work()
    heart.beat()
    heart.complete_step()
    assert read(path_of(tmp_path / "new", 3)) == (os.getpid(), True, 1, 3)
    heart.rest()
    Heart(tmp_path / "new", 4)
    assert read(path_of(tmp_path / "new", 3)) == (os.getpid(), False, 1, 3)


@pytest.mark.parametrize("goes_back", [True, False])
def test_what_follows_an_exception_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_back: bool) -> None:
    """A run that goes back verifies checkpoints and begins again, for longer than a step may take; the sidecar of the
    attempt before would end it."""
    watching = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr("llm.callback.watchdog.start_sidecar", lambda *arguments: watching)
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path))
    module: Any = None
    watchdog = Watchdog()
    watchdog.setup(trainer, module, "fit")
    watchdog.on_train_start(trainer, module)
    watchdog.on_train_batch_end(trainer, module, None, None, 0)
    path = path_of(tmp_path / sidecar.FOLDER, 0)
    assert read(path) == (os.getpid(), True, 1, 2)
    watchdog.on_exception(trainer, module, RollBackError(Window(1, "a spike", 0, 0)) if goes_back else OSError("disk"))
    assert read(path) == (os.getpid(), False, 1, 2)
    assert (watching.poll() is not None) is goes_back, "of a rank that ends the others may hang"
    watching.kill()
    watching.wait()
    watchdog.teardown(trainer, module, "fit")


class Ranks:
    """Two ranks and a clock, looked at as the sidecar does."""

    def __init__(self, floor_s: float = 30.0) -> None:
        self.judge = Judge(floor_s, 10.0)
        self.now, self.busy, self.states = 100.0, False, ["S", "S"]
        self.steps = [0, 0]

    def wait(self, seconds: float, poll_s: float = POLL_S) -> float | None:
        """What the sidecar says in that time."""
        found = None
        for _ in range(round(seconds / poll_s)):
            self.now += poll_s
            seen = {
                rank: Seen(Pulse(10 + rank, self.busy, self.steps[rank], 0), self.states[rank]) for rank in range(2)
            }
            found = found or self.judge.look(self.now, seen)
        return found

    def step(self, seconds: float) -> float | None:
        """All make a step."""
        self.busy = True
        found = self.wait(seconds)
        self.steps = [n + 1 for n in self.steps]
        return found


def test_a_step_is_too_long_after_the_floor_or_ten_medians() -> None:
    ranks = Ranks()
    assert [ranks.step(1.0) for _ in range(20)] == [None] * 20
    assert ranks.wait(29.5) is None
    assert 30 < (ranks.wait(1) or 0) < 30 + 2 * POLL_S + 0.01
    slow = Ranks()
    assert [slow.step(10.0) for _ in range(5)] == [None] * 5
    assert slow.judge.limit_s == pytest.approx(100, abs=5)
    assert slow.wait(94) is None
    assert slow.wait(7) is not None


def test_the_second_step_may_take_twice_the_first_one() -> None:
    """Nothing has been timed yet: a model whose every step takes longer than the floor is no hung one."""
    ranks = Ranks()
    assert ranks.wait(50) is None, "not busy: the first step, with all that comes before it"
    ranks.steps = [1, 1]
    ranks.busy = True
    assert ranks.wait(95) is None
    assert ranks.wait(10) is not None
    again = Ranks()
    again.wait(50)
    again.steps = [1, 1]
    assert [again.step(40.0) for _ in range(3)] == [None] * 3
    assert again.judge.limit_s == pytest.approx(400, abs=5)


def test_one_rank_that_goes_on_does_not_excuse_the_other() -> None:
    ranks = Ranks()
    ranks.step(1.0)
    found = []
    for _ in range(40):
        found.append(ranks.wait(1.0))
        ranks.steps[0] += 1
    assert any(found)


def test_what_is_no_step_may_take_an_hour() -> None:
    ranks = Ranks()
    assert ranks.wait(3600) is None, "the first step, with all that comes before it"
    ranks.step(1.0)
    ranks.busy = False
    assert ranks.wait(3600) is None, "a validation, a save"
    ranks.busy = True
    assert ranks.wait(29) is None
    assert ranks.wait(2) is not None


def test_suspended_time_does_not_count() -> None:
    ranks = Ranks()
    ranks.step(1.0)
    assert ranks.wait(20) is None
    ranks.states = ["T", "T"]
    assert ranks.wait(3600) is None
    ranks.states = ["S", "S"]
    assert ranks.wait(9) is None
    ranks.now += 3600  # the sidecar was suspended with them
    assert ranks.wait(0.5) is None
    ranks.states = ["S", "T"]
    assert ranks.wait(2) is not None, "but one rank alone is not suspended: it hangs"


def test_median_of_the_last_hundred_steps() -> None:
    ranks = Ranks()
    for _ in range(20):
        ranks.step(20.0)
    for _ in range(120):
        ranks.step(0.5)
    assert ranks.judge.limit_s == 30


@pytest.mark.parametrize(
    ("beats", "states", "waits", "expected"),
    [
        ([5, 4, 5], "SSS", (0, 1, 0), [1]),
        ([5, 5, 5], "SRS", (1, 1, 1), [1]),
        ([5, 5, 5], "RTR", (0, 1, 0), [1]),
        ([5, 5, 5], "SSS", (1, 1, 1), [0, 1, 2]),
        ([4, 5, 5], "SRR", (0, 0, 0), [0]),
        ([5, 5, 5], "RSR", (1, 0, 1), [1]),
        ([5, 5, 5], "SSR", (1, 0, 0), [2]),
    ],
)
def test_who_is_late(beats: list[int], states: str, waits: tuple[int, ...], expected: list[int]) -> None:
    ranks = {rank: Seen(Pulse(rank, True, 1, n), states[rank], bool(waits[rank])) for rank, n in enumerate(beats)}
    assert late(ranks) == expected


def test_nodes_tell_each_other_what_they_saw(tmp_path: Path) -> None:
    """So that each names the same rank."""
    nodes = [sidecar.Watched(tmp_path, first, 2, 4, 30.0, 10.0) for first in (0, 2)]
    ranks = {rank: Seen(Pulse(100 + rank, True, 7, 9 - (rank == 3)), "S", rank != 3) for rank in range(4)}
    nodes[0].folder.mkdir()
    seen = [{rank: ranks[rank] for rank in node.ranks} for node in nodes]
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(sidecar._elsewhere, nodes, seen))
    assert others == [seen[1], seen[0]]
    assert late({**seen[0], **others[0]}) == [3]


class Hang(Callback):
    """Rank 1 never comes back from the start of a step."""

    def __init__(self, how: str, step: int = 4) -> None:
        self.how, self.step = how, step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            getattr(self, self.how)(trainer)

    def loop(self, trainer: L.Trainer) -> None:
        while True:
            pass

    def gil(self, trainer: L.Trainer) -> None:
        while True:  # a signal ends it
            ctypes.PyDLL(None).sleep(3600)  # a C function that keeps the interpreter's lock

    def stopped(self, trainer: L.Trainer) -> None:
        while True:  # it is continued, to write its stack
            os.kill(os.getpid(), signal.SIGSTOP)

    def fifo(self, trainer: L.Trainer) -> None:
        path = Path(trainer.default_root_dir) / "fifo"
        os.mkfifo(path)
        path.read_text()

    def collective(self, trainer: L.Trainer) -> None:
        torch.distributed.barrier()  # which the other does not come to
        torch.distributed.barrier()


@pytest.mark.parametrize("how", ["loop", "gil", "stopped", "fifo"])
def test_a_hung_rank_is_named(corpus: Path, cache_dir: Path, tmp_path: Path, how: str) -> None:
    settings = [
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        f"run_dir={tmp_path / 'run'}",
        "strategy=ddp",
        "trainer.devices=2",
        "~callback.sample",
        "+callback.watchdog={_target_: llm.callback.Watchdog, floor_s: 1.0, factor: 2.0}",
        f"+callback.hang={{_target_: tests.test_watch.Hang, how: {how}}}",
        f"data.num_workers={int(how == 'fifo')}",
        "packages=[tests]",
    ]
    with pytest.raises(RankError):
        run_on_ranks(run_composed, 2, settings)
    end = json.loads((tmp_path / "run/exit.json").read_text())
    assert (end["code"], end["rank"]) == (76, 1)
    text = (tmp_path / "run/hang.txt").read_text()
    assert "rank 1 is late; it is step 5" in text
    first, second = text.split("==== stacks of rank ")[1:]
    assert f"in {how}" in second, "the very place where it hangs"
    assert "objective/scale.py" in first
    assert ("_worker_loop" in first and "_worker_loop" in second) == (how == "fifo"), "of loader workers, too"
