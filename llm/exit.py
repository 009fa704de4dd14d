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

CONFIG, DATA, BUG, EXISTS, STORAGE, INTERRUPTED = 64, 65, 70, 73, 74, 130


class RunExistsError(ValueError):
    """The run directory exists and `resume=never` forbids going on in it."""


def exit_code(error: BaseException) -> int:
    """The exit code that tells a batch script what happened."""
    match error:
        case SystemExit():
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
        case KeyboardInterrupt():
            return INTERRUPTED
    return BUG


@contextlib.contextmanager
def guarded(run_dir: Path | None = None) -> Iterator[None]:
    """Run the body; leave the process with the exit code of what it raises, after one line on stderr.

    A bug prints its traceback. The cause goes to `run_dir`, unless the run was refused before it owned that directory.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        code = exit_code(error)
        if code == BUG:
            traceback.print_exc()
        else:
            print(str(error) or type(error).__name__, file=sys.stderr)
        if run_dir is not None and code not in (CONFIG, EXISTS) and run_dir.is_dir():
            with contextlib.suppress(OSError):
                write_exit(run_dir, code, f"{type(error).__name__}: {error}")
        sys.exit(code)


def write_exit(run_dir: Path, code: int, cause: str, max_steps: int | None = None) -> None:
    """Leave `exit.json`; `max_steps` is the length of a run that ended by itself."""
    (run_dir / "exit.json").write_text(json.dumps({"code": code, "cause": cause, "max_steps": max_steps}) + "\n")


def finished(run_dir: Path, max_steps: int) -> bool:
    """Whether the run ended by itself, and had been asked for no fewer steps than now."""
    try:
        end = json.loads((run_dir / "exit.json").read_text())
    except (OSError, ValueError):
        return False
    return end["code"] == 0 and end["max_steps"] >= max_steps
