"""Sweeps of jobs that take no time, in a directory of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).with_name("fake.py")
OTHERS = ("CUDA_VISIBLE_DEVICES",)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith(("LLM_", "SLURM_", "MASTER_", "TORCHELASTIC_")) or name in OTHERS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(FAKE.parents[2]))


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(*words, program=fake.py)`: a sweep in a process and session of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, program: Path = FAKE) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), "-m", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def sweep(start: Start) -> Callable[..., tuple[int, str]]:
    """`sweep(*words)`: the exit code, and what was said."""

    def run(*words: str) -> tuple[int, str]:
        process = start(*words)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    return run


def ran() -> list[dict[str, Any]]:
    """Every job that was started so far, in that order."""
    path = Path("ran")
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def rows(said: str) -> list[list[str]]:
    """The table that a sweep ends with, without its title."""
    lines = said.splitlines()
    first = max(n for n, text in enumerate(lines) if text.startswith("job "))
    after = next(n for n, text in enumerate(lines) if n > first and " jobs: " in text)
    return [text.split() for text in lines[first + 1 : after]]
