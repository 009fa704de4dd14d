"""The process that watches the ranks of a node: `python -m llm.watch RUN …`, started by the first of them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llm.exit import LOST, record
from llm.launch import Place, die_with_parent
from llm.watch.heart import Pulse, path_of, read
from llm.watch.judge import Judge, Seen, late

FOLDER = ".watch"
_POLL_S = 0.25
_STACKS_S = 1.0  # for ranks to write their stacks
_FRAMES = 5  # on top of a stack
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "llm/reduce/collectives.py")
_OTHERS_S = 2.0  # for the sidecars of other nodes to see what this one saw


@dataclass(frozen=True)
class Watched:
    """Which ranks: `n_local` of them from `first` on, of `world_size` in the run; and what is too long."""

    run_dir: Path
    first: int
    n_local: int
    world_size: int
    floor_s: float
    factor: float

    @property
    def folder(self) -> Path:
        """Where the ranks' hearts beat, and their stacks go."""
        return self.run_dir / FOLDER

    @property
    def ranks(self) -> range:
        """Those of this node."""
        return range(self.first, self.first + self.n_local)


def start_sidecar(run_dir: Path, here: Place, floor_s: float, factor: float) -> subprocess.Popen[bytes]:
    """Called by the first rank of each node; the sidecar ends with it."""
    first = here.rank - here.local_rank
    arguments = [os.getpid(), run_dir, first, here.local_world_size, here.world_size, floor_s, factor]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        # -P: this code, and not that of the working directory.
        [sys.executable, "-P", "-m", "llm.watch", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
    )


def stacks_path(folder: Path, rank: int) -> Path:
    """Where faulthandler writes the stacks of a rank, on SIGQUIT."""
    return path_of(folder, rank).with_suffix(".stacks")


def watch(watched: Watched, parent: int) -> None:
    """Look until a step takes too long; then say so, and end the ranks. Ends with the process that started it."""
    die_with_parent()
    judge = Judge(watched.floor_s, watched.factor)
    _seen_path(watched).unlink(missing_ok=True)  # of an earlier attempt
    while os.getppid() == parent:
        time.sleep(_POLL_S)
        seen = look(watched)
        took_s = judge.look(time.monotonic(), seen)
        if took_s is not None and len(seen) == watched.n_local:
            end(watched, seen, took_s, judge.limit_s)
            return


def look(watched: Watched) -> dict[int, Seen]:
    """The ranks of this node that live."""
    found = {}
    for rank in watched.ranks:
        pulse = read(path_of(watched.folder, rank))
        state = None if pulse is None else _state(pulse.pid)
        if pulse is not None and state not in (None, "Z", "X"):
            found[rank] = Seen(pulse, str(state))
    return found


def end(watched: Watched, seen: dict[int, Seen], took_s: float, limit_s: float) -> None:
    """Stacks, the late rank, `exit.json`; then the end of all ranks of this node."""
    stacks = _stacks(watched, seen)
    seen = {rank: one._replace(waits=_waits(stacks[rank])) for rank, one in seen.items()}
    everywhere = {**seen, **_elsewhere(watched, seen)}
    names = late(everywhere)
    who = f"rank {names[0]} is late" if len(names) == 1 else f"ranks {', '.join(map(str, names))} are late"
    if all(one.waits for one in everywhere.values()):
        who = "all ranks wait in collectives, not all of them in the same"
    step = min(one.pulse.steps for one in everywhere.values()) + 1
    cause = f"a step has taken {took_s:.1f} s, and may take {limit_s:.1f} s: {who}"
    report = watched.run_dir / "hang.txt"
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    lines = [f"{when}: {cause}; it is step {step} since the start of these processes"]
    for rank, (pulse, state, waits) in sorted(everywhere.items()):
        told = "waits for others" if waits else f"state {state}"
        lines.append(f"rank {rank}: pid {pulse.pid}, {pulse.steps} steps, {pulse.beats} beats, {told}")
    lines += [f"\n==== stacks of rank {rank}\n{text}" for rank, text in stacks.items()]
    with open(report, "a") as file:
        file.write("\n".join(lines) + "\n")
    with contextlib.suppress(OSError):
        record(watched.run_dir, LOST, f"hang: {cause}", names[0], final=True)
    if watched.first in (0, names[0]):
        print(f"{cause}; the stacks of all ranks are in {report}; the run is ended", file=sys.stderr, flush=True)
    for rank in reversed(watched.ranks):  # the first is this process's own parent
        with contextlib.suppress(ProcessLookupError):
            os.kill(seen[rank].pulse.pid, signal.SIGKILL)


def _elsewhere(watched: Watched, seen: dict[int, Seen]) -> dict[int, Seen]:
    """What the sidecars of other nodes have seen, who wait as long as this one does."""
    if watched.n_local == watched.world_size:
        return {}
    mine = {rank: [*one.pulse, one.state, one.waits] for rank, one in seen.items()}
    temporary = _seen_path(watched).with_suffix(".tmp")
    temporary.write_text(json.dumps(mine))
    os.replace(temporary, _seen_path(watched))
    found: dict[int, Seen] = {}
    deadline = time.monotonic() + _OTHERS_S
    while len(found) < watched.world_size and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        for path in watched.folder.glob("seen-*.json"):
            for rank, (*pulse, state, waits) in json.loads(path.read_text()).items():
                found[int(rank)] = Seen(Pulse(*pulse), state, waits)
    return {rank: one for rank, one in found.items() if rank not in seen}


def _seen_path(watched: Watched) -> Path:
    return watched.folder / f"seen-{watched.first}.json"


def _stacks(watched: Watched, seen: dict[int, Seen]) -> dict[int, str]:
    """By SIGQUIT, which faulthandler answers from C, whoever holds the interpreter's lock; a rank that was stopped has
    to be continued for that. Loader workers write into the file of their rank, behind it."""
    before = {rank: _size(stacks_path(watched.folder, rank)) for rank in seen}
    for pulse, state, _ in seen.values():
        _quit(pulse.pid)
        if state in "Tt":
            os.kill(pulse.pid, signal.SIGCONT)
    _settled(watched, seen)
    for pulse, _, _ in seen.values():
        for worker in _workers(pulse.pid):
            _quit(worker)
    _settled(watched, seen)
    found = {}
    for rank in seen:
        with open(stacks_path(watched.folder, rank), errors="replace") as file:
            file.seek(before[rank])
            found[rank] = file.read()
    return found


def _quit(pid: int) -> None:
    """To the main thread, as any thread may answer what is sent to the process; where it would end the process, not."""
    if _answers(pid):
        ctypes.CDLL(None).tgkill(pid, pid, int(signal.SIGQUIT))


def _answers(pid: int) -> bool:
    """Whether a process has a handler for SIGQUIT."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGQUIT - 1) & 1)


def _settled(watched: Watched, seen: dict[int, Seen]) -> None:
    """Return when the files have stopped growing."""
    deadline, before = time.monotonic() + _STACKS_S, [-1]
    while time.monotonic() < deadline:
        now = [_size(stacks_path(watched.folder, rank)) for rank in seen]
        if now == before and all(now):
            return
        before = now
        time.sleep(_POLL_S)


def _waits(stacks: str) -> bool:
    """Whether the thread that was asked, which is the main one and comes first, is in a collective, or in a backward,
    which ends in one."""
    _, _, main = stacks.partition("Current thread")
    frames = [line for line in main.partition("\n\n")[0].splitlines() if line.startswith("  File")]
    return any(place in frame for frame in frames[:_FRAMES] for place in _WAITING)


def _state(pid: int) -> str | None:
    """The kernel's letter for what the main thread of a process does; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def _workers(pid: int) -> list[int]:
    """The children that run the same program: loader workers."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        program = os.readlink(f"/proc/{pid}/exe")
        alike = [int(child) for child in children if os.readlink(f"/proc/{child}/exe") == program]
    except OSError:
        return []
    return [child for child in alike if child != os.getpid()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
