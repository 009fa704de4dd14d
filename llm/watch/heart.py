"""How far a rank has come: four numbers in a file that it and the sidecar have mapped into memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

_PID, _BUSY, _STEPS, _BEATS = range(4)  # unsigned, 8 bytes each: written, and read, in one piece
_SIZE = 4 * 8


class Pulse(NamedTuple):
    """What a rank has last said of itself.

    pid    its process
    busy   it makes steps; not starting, validating, sampling or saving, which may take as long as they like
    steps  that it has completed
    beats  places that it has come by within steps
    """

    pid: int
    busy: bool
    steps: int
    beats: int


class Heart:
    """Of this rank, in `folder`. A beat costs a tenth of a microsecond.

    Raises OSError where the file cannot be made, or mapped.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path_of(folder, rank).with_suffix(f".{os.getpid()}")
        temporary.write_bytes(bytes(_SIZE))
        with open(temporary, "r+b") as file:
            self._memory = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("Q")
        self._memory[_PID] = os.getpid()
        os.replace(temporary, path_of(folder, rank))  # that of an earlier attempt is another file

    def beat(self) -> None:
        """Another place within the step."""
        self._memory[_BEATS] += 1

    def work(self) -> None:
        """From now on the next step is expected."""
        self.beat()
        self._memory[_BUSY] = 1

    def complete_step(self) -> None:
        """One step more."""
        self.beat()
        self._memory[_STEPS] += 1

    def rest(self) -> None:
        """Something that is no step, for as long as it takes."""
        self._memory[_BUSY] = 0


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's heart beats."""
    return folder / f"rank-{rank:08d}"


def read(path: Path) -> Pulse | None:
    """What a rank has last said; None if it has said nothing yet."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) < _SIZE:
        return None
    pid, busy, steps, beats = memoryview(raw).cast("Q")
    return Pulse(pid, bool(busy), steps, beats)
