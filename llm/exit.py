"""How a run ends: exit codes for batch scripts, and `RUN/exit.json` with the cause.

0 done, 64 configuration, 65 data, 70 bug, 73 the run exists, 74 storage, 75 told to go and saved, 76 interrupted from
outside with nothing saved since the last checkpoint, 130 Ctrl-C. An error says its code itself: `exit_code`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

FINISHED, STOPPED_EARLY = "finished", "stopped early"
_FILE = "exit.json"
BUG, EXISTS, STORAGE, SAVED, LOST, INTERRUPTED = 70, 73, 74, 75, 76, 130

# What gloo and NCCL say when a peer is gone or silent.
_LOST = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "remote process",
    "remote peer",
    "communicator was aborted",
    "Connect timeout",
    "wait timeout after",
)
STAND_BACK_S = 5.0  # how long rank 0 may need, on a busy machine, to say why all ranks end

_rank, _n_ranks, _watched = 0, 1, False


class RunExistsError(ValueError):
    """The run directory exists and `resume=never` forbids going on in it."""

    exit_code = EXISTS


class LostPeerError(Exception):
    """Another rank is gone, did not come, or does not answer; whatever ended it is the cause, not this.

    Args:
        cause: the exit code with which that rank said it would leave, if it said so.
    """

    exit_code = LOST

    def __init__(self, message: str, cause: int | None = None) -> None:
        super().__init__(message)
        self.cause = cause


def as_rank(rank: int, n_ranks: int, *, watched: bool = False) -> None:
    """Say once a process which of the job's processes it is, for what `guarded` and `recorded` do.

    Args:
        rank: of this process.
        n_ranks: of the job.
        watched: by our launcher, which sees how each rank ends and tells a cause from what followed.
    """
    global _rank, _n_ranks, _watched
    _rank, _n_ranks, _watched = rank, n_ranks, watched


def exit_code(error: BaseException) -> int:
    """The exit code that tells a batch script what happened."""
    if _leaving(error):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return INTERRUPTED
    if lost_contact(error):
        return LOST
    return STORAGE if isinstance(error, OSError) else BUG


def _first_is_me(code: int) -> bool:
    return True


def _nothing() -> None:
    pass


@contextlib.contextmanager
def guarded(first: Callable[[int], bool] = _first_is_me, then: Callable[[], None] = _nothing) -> Iterator[None]:
    """Run the body; leave the process with the exit code of what it raises, after one line on stderr, and `then`.

    A bug prints its traceback. Among several ranks only that prints for which `first`, of the exit code, is true.
    """
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        silent = False
        if _leaving(error):
            if _n_ranks == 1 or code == 0:
                raise
            silent = not isinstance(error.code, str)
        try:
            if not silent and _is_first(first, code):
                _say(error, code)
            then()
        finally:  # whatever happens while speaking, a second Ctrl-C or a closed pipe
            _leave(_of_cause(error, code))


def _of_cause(error: BaseException, code: int) -> int:
    """srun ends with the highest code of its tasks: who only lost another must not ask for one more try of what no try
    mends. Our launcher tells the two apart by themselves."""
    cause = error.cause if isinstance(error, LostPeerError) and not _watched else None
    return code if cause is None or code != LOST else cause


def stand_back(code: int, wait_s: float = STAND_BACK_S) -> NoReturn:
    """Leave for a reason that rank 0 has too and says: after it, since torchrun ends the job at the first exit."""
    time.sleep(wait_s)
    _leave(code)


@contextlib.contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """While the body runs, the run has no end; if it raises, the cause is left in `exit.json`.

    Among several ranks, rank 0 has to be in here before the others come: it takes the end of the last attempt away.
    """
    if _rank == 0:
        (run_dir / _FILE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        if code != 0:
            _record_error(run_dir, error, code)
        first = _read(run_dir)
        if code == LOST and not _watched and first is not None and first["code"] not in (0, LOST):
            # srun ends with the highest code of its tasks: ours must not be one that asks for another try.
            lost = LostPeerError(
                f"{lost_words(error)}; the cause is that of rank {first.get('rank')}: {first['cause']}"
            )
            lost.exit_code = first["code"]
            raise lost from error
        raise


@contextlib.contextmanager
def before_begun(run_dir: Path) -> Iterator[None]:
    """If the body raises what no other try mends, the cause is left in `exit.json`, though the run never began."""
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        if code not in (0, SAVED, LOST, INTERRUPTED):
            with contextlib.suppress(OSError):
                forget(run_dir)
            _record_error(run_dir, error, code)
        raise


def _record_error(run_dir: Path, error: BaseException, code: int) -> None:
    """`record` what this rank met; a disk that cannot be written must not hide it."""
    with contextlib.suppress(OSError):
        cause = lost_words(error) if code == LOST else f"{type(error).__name__}: {error}"
        record(run_dir, code, cause, _rank if _n_ranks > 1 else None)


def record(run_dir: Path, code: int, cause: str, rank: int | None = None, *, final: bool = False) -> None:
    """Write what ended the run, unless that has been written: the first cause stays, but a lost peer is none.

    Args:
        final: who says this ends the ranks, so that whatever else is said follows from it.
    """
    end: dict[str, Any] = {"code": code, "cause": cause} | ({} if rank is None else {"rank": rank})
    end |= {"final": True} if final else {}
    temporary = _written(run_dir, end)
    try:
        os.link(temporary, run_dir / _FILE)  # of several processes that do this, one succeeds
    except OSError:  # there is one, or the file system has no links
        before = _read(run_dir)
        if final or before is None or (before.get("code") == LOST and code != LOST and "final" not in before):
            os.replace(temporary, run_dir / _FILE)
    finally:
        temporary.unlink(missing_ok=True)


def final_end(run_dir: Path) -> int | None:
    """The exit code that somebody recorded who then ended the ranks; None if nobody did."""
    end = _read(run_dir) or {}
    return end["code"] if "final" in end else None


def version(run_dir: Path) -> tuple[int, int] | None:
    """What changes when another end is recorded; None if there is none."""
    try:
        status = (run_dir / _FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def forget(run_dir: Path) -> None:
    """Remove the end that an earlier attempt left, unless it is that of a finished run."""
    if (_read(run_dir) or {}).get("code") != 0:
        (run_dir / _FILE).unlink(missing_ok=True)


def write_end(run_dir: Path, step: int, max_steps: int) -> None:
    """A run that ended by itself: after all its steps, or before, stopped by a callback."""
    cause = FINISHED if step >= max_steps else STOPPED_EARLY
    end = {"code": 0, "cause": cause, "step": step, "max_steps": max_steps}
    os.replace(_written(run_dir, end), run_dir / _FILE)


def finished(run_dir: Path, max_steps: int) -> int | None:
    """The step at which the run ended by itself, if a run of `max_steps` would have nothing to add; else None."""
    end = _read(run_dir)
    if end is None or end["code"] != 0:
        return None
    enough = end["max_steps"] if end["cause"] == STOPPED_EARLY else end["step"]
    return end["step"] if enough >= max_steps else None


def _is_first(first: Callable[[int], bool], code: int) -> bool:
    try:
        return first(code)
    except Exception:  # who cannot ask the others must speak
        return True


def _say(error: BaseException, code: int) -> None:
    """In one write, so that the lines of two ranks do not mix."""
    if _n_ranks > 1:  # the launcher may end everybody as soon as another rank has left: speak first
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    text = str(error) or type(error).__name__
    prefix = f"rank {_rank}: " if _rank > 0 else ""
    if code == BUG and not hasattr(error, "exit_code"):
        text = "".join(traceback.format_exception(error)).rstrip()
    elif code == LOST or isinstance(error, LostPeerError):
        text, prefix = lost_words(error), f"rank {_rank}: "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def _leave(code: int) -> NoReturn:
    """As `sys.exit` does; among several ranks at once, since taking down a broken process group may hang."""
    if _n_ranks == 1:
        raise SystemExit(code) from None
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
                stream.flush()
        for child in multiprocessing.active_children():  # loader workers, which an orderly end would stop
            child.kill()
    finally:
        os._exit(code)


def lost_contact(error: BaseException) -> bool:
    """Whether it began with torch.distributed missing a peer. Its classes are told by name: importing it is slow."""
    if _n_ranks == 1:
        return False
    origin = _origin(error)
    names = {kind.__name__ for kind in type(origin).__mro__}
    network = bool(names & {"DistNetworkError", "DistStoreError"}) and "EADDRINUSE" not in str(origin)
    return network or (isinstance(origin, RuntimeError) and any(text in str(origin) for text in _LOST))


def lost_words(error: BaseException, whom: str = "another rank") -> str:
    """What is said of a peer that is gone: in our words, or those of gloo without its source line and its advice."""
    if isinstance(error, LostPeerError):
        return str(error)
    reason = re.split(r"\. |\n", re.sub(r"^\[[^\]]*\] ", "", str(_origin(error))))[0]
    return f"lost contact with {whom} ({reason})"


def _origin(error: BaseException) -> BaseException:
    """What was raised first: taking down a run whose peer is gone raises more."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error if before is None else _origin(before)


def _leaving(error: BaseException) -> TypeGuard[SystemExit]:
    """Whether somebody called sys.exit: no error, and nothing to be said of it."""
    return isinstance(error, SystemExit) and not hasattr(error, "exit_code") and not _interrupted(error)


def _interrupted(error: SystemExit) -> bool:
    """Whether this is what Lightning makes of Ctrl-C outside our steps."""
    return isinstance(error.__context__, KeyboardInterrupt) and not error.__suppress_context__


def _read(run_dir: Path) -> dict[str, Any] | None:
    try:
        end = json.loads((run_dir / _FILE).read_text())
    except (OSError, ValueError):
        return None
    return end if isinstance(end, dict) else None


def _written(run_dir: Path, end: dict[str, Any]) -> Path:
    """`end` in a file beside the final one, whole before it gets its name."""
    temporary = run_dir / f".{_FILE}.{secrets.token_hex(4)}"
    temporary.write_text(json.dumps(end) + "\n")
    return temporary
