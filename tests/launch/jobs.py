"""Ranks that are a few lines of Python: they start in 20 ms."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Tells in one write, so that the words of two ranks do not mix.
PRELUDE = """
import os, signal, sys
rank = int(os.environ["RANK"])
held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # as signals.listen does
def tell(*words): os.write(1, (" ".join(map(str, (rank, *words))) + "\\n").encode())
"""

Start = Callable[..., "subprocess.Popen[str]"]


def command(body: str) -> list[str]:
    """A rank that runs `body`, which may `tell` and knows its `rank`."""
    return [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(body)]


def left(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What a job had still to say, line by line, and its stderr; only once all that write there are gone."""
    out, err = process.communicate(timeout=20)
    return sorted(out.splitlines()), err
