"""Attempts are on record, and a job that comes no further ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm import attempts
from llm.exit import LostPeerError, exit_code
from llm.run import run
from tests.runs import Compose


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return "12"


def test_interruptions(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that said why it ended, one that could not, and the one that is at work."""
    attempts.begin(tmp_path, 0, 2)
    with pytest.raises(LostPeerError), attempts.attempted(tmp_path, first=True):
        raise LostPeerError("rank 1 is gone")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    attempts.begin(tmp_path, 10, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    attempts.begin(tmp_path, 20, 4)
    first, second = attempts.interruptions(tmp_path)
    assert (first["step"], first["code"], first["cause"]) == (0, 76, "LostPeerError: rank 1 is gone")
    assert (second["step"], second["code"], second["restart"], second["world_size"]) == (10, None, 1, 2)
    with attempts.attempted(tmp_path, first=True):
        pass
    assert attempts.rows(tmp_path)[-1]["code"] == 0
    assert attempts.interruptions(tmp_path) == [first, second]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with attempts.attempted(tmp_path, first=False):
        pass
    assert attempts.rows(tmp_path) == []


def test_no_progress(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(attempts.IN_A_ROW):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        attempts.begin(tmp_path, 10, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(attempts.NoProgressError, match="job 12 began at step 10 3 times") as error:
        attempts.begin(tmp_path, 10, 1)
    assert exit_code(error.value) == 70
    attempts.begin(tmp_path, 11, 1)
    attempts.begin(tmp_path, 11, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # submitted anew
    attempts.begin(tmp_path, 11, 1)


def test_within_an_allocation_anybody_may_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of salloc, say, where the job stays the same."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for _ in range(5):
        attempts.begin(tmp_path, 0, 1)


def test_outside_slurm_anybody_may_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(5):
        attempts.begin(tmp_path, 0, 1)


def test_a_line_that_was_cut_short(tmp_path: Path) -> None:
    """By a crash: it is left out, and the next one is whole."""
    attempts.begin(tmp_path, 0, 1)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"at": "2026-01-0')
    attempts.begin(tmp_path, 3, 1)
    assert [row["step"] for row in attempts.rows(tmp_path)] == [0, 3]


def test_the_end_of_a_run_that_comes_no_further_is_on_record(
    compose_run: Compose, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks leave with 76, and a batch script goes by what is written down."""
    (tmp_path / "run").mkdir()
    for restart in range(attempts.IN_A_ROW):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        attempts.begin(tmp_path / "run", 0, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempts.IN_A_ROW))
    with pytest.raises(attempts.NoProgressError):
        run(compose_run())
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 70
