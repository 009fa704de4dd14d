"""One run, one directory: who writes into it holds its lock, and everybody else leaves with exit code 73.

A lock is a file `RUN/.lock/000000NN.json` that names host, process and job. Whoever wants it makes the file with the
next higher number, which on any file system only one can; the highest number holds. No flock, which network file
systems may not have, and which says nothing of who holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llm.exit import EXISTS

FOLDER = ".lock"
BEAT_S = 5.0  # how often a holder shows that it lives
SILENCE_S = 30.0  # after which one on another host, whose process cannot be looked at, is taken for dead


class LockedError(ValueError):
    """Another process writes into the run directory."""

    exit_code = EXISTS


@dataclass(frozen=True)
class Holder:
    """Which process: ids of processes are only of use on the same host, since the same boot, in the same namespace."""

    host: str
    pid: int
    started: int  # clock ticks between boot and the start of the process: another process may get the same id
    boot: str
    namespace: str
    job: str | None  # SLURM's
    restart: int  # how often SLURM has requeued that job

    @classmethod
    def this(cls) -> Holder:
        pid = os.getpid()
        boot = _text(Path("/proc/sys/kernel/random/boot_id")).strip()
        namespace = ""
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(socket.gethostname(), pid, _started(pid), boot, namespace, os.environ.get("SLURM_JOB_ID"), restart)

    def __str__(self) -> str:
        job = "" if self.job is None else f" of job {self.job}"
        return f"process {self.pid}{job} on {self.host}"

    def gone(self, me: Holder) -> bool | None:
        """Whether it has ended; None if that cannot be seen from here."""
        if self.job is not None and self.job == me.job and self.restart < me.restart:
            return True  # SLURM has ended the job before it requeued it
        if self.host != me.host:
            return None
        if self.boot != me.boot:
            return True
        return None if self.namespace != me.namespace else _started(self.pid) != self.started


class Lock:
    """The lock of a run directory, held from `take` to `release` or to the end of the process."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / FOLDER
        self.file: Path | None = None
        self._stop = threading.Event()

    def take(self) -> None:
        """Take the lock, or leave it to who has it.

        Raises:
            LockedError: naming who holds it.
            OSError: if nothing can be written there.
        """
        me = Holder.this()
        self.folder.mkdir(parents=True, exist_ok=True)
        highest = _highest(self.folder)
        if highest is not None:
            self._must_be_gone(highest, me)
        mine = self.folder / f"{0 if highest is None else int(highest.stem) + 1:08d}.json"
        made = _made(mine, json.dumps(asdict(me)))
        if not made or _highest(self.folder) != mine:
            if made:  # while another, who came later, had already seen more
                mine.unlink(missing_ok=True)
            raise self._locked(_highest(self.folder))
        for older in _files(self.folder)[:-1]:
            older.unlink(missing_ok=True)
        self.file = mine
        threading.Thread(target=self._beat, args=(mine,), daemon=True).start()

    def held(self) -> bool:
        """Whether nobody has taken this process for dead and its place."""
        return self.file is not None and _highest(self.folder) == self.file

    def still(self) -> None:
        """Raise LockedError unless the lock is held: for who is about to write."""
        if not self.held():
            raise self._locked(_highest(self.folder))

    def release(self) -> None:
        """Let others have the directory."""
        self._stop.set()
        if self.file is not None and self.held():
            self.file.unlink(missing_ok=True)
        self.file = None

    def _must_be_gone(self, file: Path, me: Holder) -> None:
        holder = _holder(file)
        gone = None if holder is None else holder.gone(me)
        if gone is None:
            gone = _silent(file)
        if not gone:
            raise self._locked(file)

    def _locked(self, file: Path | None) -> LockedError:
        holder = None if file is None else _holder(file)
        return LockedError(
            f"run_dir: {self.folder.parent} - {holder or 'another process'} writes into it - wait for its end, or give "
            "another run_dir"
        )

    def _beat(self, file: Path) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(file)


@contextlib.contextmanager
def locked(run_dir: str | Path) -> Iterator[Lock]:
    """The lock of `run_dir` for as long as the body runs."""
    lock = Lock(run_dir)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def _silent(file: Path) -> bool:
    """Whether a holder that should show that it lives does not: by our own watch, as clocks of hosts differ."""
    with contextlib.suppress(FileNotFoundError):
        first, deadline = file.stat().st_mtime_ns, time.monotonic() + SILENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_S, SILENCE_S) / 5)
            if file.stat().st_mtime_ns != first:
                return False
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.stem.isdecimal())


def _highest(folder: Path) -> Path | None:
    return next(reversed(_files(folder)), None)


def _holder(file: Path) -> Holder | None:
    try:
        return Holder(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _made(file: Path, content: str) -> bool:
    """Make a file that is not there, with its content at once; False if somebody else was first."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary.write_text(content)
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # no links here: for a moment the file is empty, and its holder unknown, so alive
        try:
            with open(file, "x") as opened:
                opened.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _started(pid: int) -> int:
    """When the process with this id began; -1 if there is none, or it has ended and waits for its parent."""
    status = _text(Path(f"/proc/{pid}/stat"))
    fields = status.rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] not in "ZX" else -1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
