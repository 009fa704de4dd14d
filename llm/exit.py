"""How a run ends: exit codes for batch scripts, and `RUN/exit.json` with the cause.

0 done, 64 configuration, 65 data, 70 bug, 73 the run exists, 74 storage, 75 told to go and saved, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from llm.callback import PreemptedError
from llm.checkpoint import CheckpointError
from llm.config import ConfigError
from llm.data import DataError

FINISHED, STOPPED_EARLY = "finished", "stopped early"
_FILE = "exit.json"
CONFIG, DATA, BUG, EXISTS, STORAGE, INTERRUPTED = 64, 65, 70, 73, 74, 130


class RunExistsError(ValueError):
    """The run directory exists and `resume=never` forbids going on in it."""


def exit_code(error: BaseException) -> int:
    """The exit code that tells a batch script what happened."""
    match error:
        case SystemExit() if not _interrupted(error):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case ConfigError():
            return CONFIG
        case DataError():
            return DATA
        case RunExistsError():
            return EXISTS
        case CheckpointError() | OSError():
            return STORAGE
        case PreemptedError():
            return error.exit_code
        case KeyboardInterrupt() | SystemExit():
            return INTERRUPTED
    return BUG


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Run the body; leave the process with the exit code of what it raises, after one line on stderr.

    A bug prints its traceback.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not _interrupted(error):
            raise
        code = exit_code(error)
        if code == BUG:
            traceback.print_exc()
        else:
            print(str(error) or type(error).__name__, file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """While the body runs, the run has no end; if it raises, the cause is left in `exit.json`."""
    (run_dir / _FILE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            _write(run_dir, {"code": exit_code(error), "cause": cause})
        raise


def write_end(run_dir: Path, step: int, max_steps: int) -> None:
    """A run that ended by itself: after all its steps, or before, stopped by a callback."""
    cause = FINISHED if step >= max_steps else STOPPED_EARLY
    _write(run_dir, {"code": 0, "cause": cause, "step": step, "max_steps": max_steps})


def finished(run_dir: Path, max_steps: int) -> int | None:
    """The step at which the run ended by itself, if a run of `max_steps` would have nothing to add; else None."""
    try:
        end = json.loads((run_dir / _FILE).read_text())
    except (OSError, ValueError):
        return None
    if end["code"] != 0:
        return None
    enough = end["max_steps"] if end["cause"] == STOPPED_EARLY else end["step"]
    return end["step"] if enough >= max_steps else None


def _interrupted(error: SystemExit) -> bool:
    """Whether this is what Lightning makes of Ctrl-C outside our steps."""
    return isinstance(error.__context__, KeyboardInterrupt)


def _write(run_dir: Path, end: dict[str, object]) -> None:
    (run_dir / _FILE).write_text(json.dumps(end) + "\n")
