"""Every point at which a process can die while it saves, one after the other: a child is forked and kills itself there.

Each system call that changes the disk is a point before it, each write also a point in its middle.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llm.checkpoint import newest_verified, read_state, read_tensors

_CHANGING = ("fsync", "mkdir", "rename", "rmdir", "unlink")


class Countdown:
    """Kills this process at the n-th point; without one it only counts."""

    def __init__(self, n: int | None = None) -> None:
        self.n, self.count = n, 0

    def tick(self) -> None:
        self.count += 1
        if self.count == self.n:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> Callable[[], None]:
        """Count what the os module is asked to do from here on; returns how to stop that."""
        real = {name: getattr(os, name) for name in (*_CHANGING, "open", "write")}

        def before(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.tick()
                return real[name](*args, **kwargs)

            return call

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self.tick()
            return real["open"](path, flags, *args, **kwargs)

        def written(descriptor: int, data: Any) -> int:
            self.tick()
            half = memoryview(data)[: len(data) // 2]
            done = real["write"](descriptor, half)
            self.tick()
            return done + real["write"](descriptor, memoryview(data)[done:])

        for name in _CHANGING:
            setattr(os, name, before(name))
        os.open, os.write = opened, written  # type: ignore[assignment]

        def restore() -> None:
            for name, function in real.items():
                setattr(os, name, function)

        return restore


def survivors(folder: Path, before: Callable[[Path], None], save: Callable[[Path], None]) -> list[int | None]:
    """For each point of `save`, the step of the newest verified checkpoint after a death there; None: there is none.

    Args:
        folder: for runs, each in a state that `before` makes.
        save: what is done in a child that dies at the point. What a checkpoint of step n holds is n.
    """
    template = folder / "template"
    before(template)
    counting = Countdown()
    shutil.copytree(template, folder / "whole")
    restore = counting.install()
    save(folder / "whole")
    restore()
    found: list[int | None] = []
    for point in range(1, counting.count + 1):
        run_dir = folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(template, run_dir)
        child = os.fork()
        if child == 0:
            Countdown(point).install()
            save(run_dir)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"point {point} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        found.append(_newest(run_dir))
    return found


def _newest(run_dir: Path) -> int | None:
    step = newest_verified(run_dir)
    if step is None:
        return None
    number = int(step.name.removeprefix("step-"))
    assert read_state(step)["step"] == number
    assert all((values == number).all() for values in read_tensors(step).values())
    return number


def survivors_of_ranks(
    folder: Path, before: Callable[[Path], None], save: Callable[[Path], None], rank: int
) -> list[int | None]:
    """As `survivors`, of a save by two processes of which `rank` dies."""
    template = folder / "template"
    before(template)
    found: list[int | None] = []
    n_points = None
    while n_points is None or len(found) < n_points:
        run_dir, told = folder / "run", folder / "told"
        for path in (run_dir, told):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, run_dir)
        told.mkdir()
        point = None if n_points is None else len(found) + 1
        children = [_rank(number, told, partial(save, run_dir), rank, point) for number in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if n_points is None:
            assert codes == [0, 0]
            n_points = int((told / "count").read_text())
        else:
            assert codes[rank] == -signal.SIGKILL, f"point {point} was not reached: {codes}"
            found.append(_newest(run_dir))
    return found


def _rank(number: int, told: Path, save: Callable[[], None], dying: int, point: int | None) -> int:
    """Fork one of two processes that save together."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:  # whatever happens, this copy of the test's process must not go on with the test
        store = dist.FileStore(str(told / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=20))
        countdown = Countdown(point)
        if number == dying:
            countdown.install()
        save()
        dist.barrier()  # neither goes while the other may still talk to it
        if number == dying:
            (told / "count").write_text(str(countdown.count))
        code = 0
    finally:
        os._exit(code)
