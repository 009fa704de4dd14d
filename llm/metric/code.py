"""Programs that a model has written, run: in a process of its own, with little time, memory and disk.

That keeps an honest program from doing harm by accident, and no more: it runs as the user who asks for it, who should
be nobody in particular, in a container.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Of a program: seconds by the clock and of the processor, bytes of memory, of a file, and processes or threads."""

    wall_s: float = 10.0
    memory: int = 1 << 30
    file: int = 1 << 20
    processes: int = 64


def verdict(program: str, limits: Limits | None = None) -> str:
    """`passed`, or what became of a Python program: `failed: …`, the last line that it said, or `timed out`."""
    limits = limits or Limits()

    def confine() -> None:
        seconds = int(limits.wall_s) + 1
        for what, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, limits.memory),
            (resource.RLIMIT_FSIZE, limits.file),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (most, most))
        with contextlib.suppress(ValueError, OSError):  # root has none
            resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "program.py"
        path.write_text(program, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", str(path)],
            cwd=scratch,
            env={"PATH": os.defpath, "HOME": scratch},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=confine,
        )
        try:
            _, said = process.communicate(timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has started goes with it
            process.wait()
    if process.returncode == 0:
        return "passed"
    lines = said.strip().splitlines()
    return f"failed: {lines[-1] if lines else f'exit code {process.returncode}'}"


def verdicts(programs: Sequence[str], limits: Limits | None = None) -> list[str]:
    """Of each, in order, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: verdict(program, limits), programs))
