"""Launchers in processes of their own, and an environment without any."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, Start, command

OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def _no_launcher_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("LLM_", "SLURM_", "MASTER_", "TORCHELASTIC_")) or name in OTHERS:
            monkeypatch.delenv(name)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(body, n, before="", **options)`: a launcher in a process and session of its own, whose run is tmp_path."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, n: int = 2, before: str = "", **options: object) -> subprocess.Popen[str]:
        call = f"launch({command(body)!r}, {n}, run_dir={str(tmp_path)!r}, **{options!r})"
        program = f"import sys, signal\nfrom llm.launch import launch\n{before}\nsys.exit({call})"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # and with it, at most, ranks of a test that failed
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
