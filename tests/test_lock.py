"""Of any number of processes that want a run directory, one gets it, and it is free again when that one is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llm import lock
from llm.lock import Holder, Lock, LockedError, locked

# Waits at a pipe for the start of the race; says whether it won; a winner keeps the lock until its input ends.
RACER = """
import sys
from llm.lock import Lock, LockedError
run_dir, start = sys.argv[1], int(sys.argv[2])
sys.stdout.write("r"); sys.stdout.flush()
import os; os.read(start, 1)
try:
    Lock(run_dir).take()
except LockedError as error:
    sys.stdout.write("lost " + str(error.exit_code)); sys.exit(0)
sys.stdout.write("won"); sys.stdout.flush()
sys.stdin.read()
"""


def race(run_dir: Path, n: int) -> list[str]:
    """What each of `n` processes says that start at once; winners are killed when all have spoken."""
    start, ready = os.pipe()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(run_dir), str(start)],
            pass_fds=[start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(n)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.read(1) == b"r"
        os.write(ready, b"x" * n)
        said = []
        for racer in racers:
            assert racer.stdout is not None
            said.append(os.read(racer.stdout.fileno(), 100).decode())
        return said
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
        os.close(start)
        os.close(ready)


def test_one_winner_each_race_over_what_a_killed_one_left(tmp_path: Path) -> None:
    for _ in range(5):
        said = race(tmp_path, 4)
        assert sorted(said) == ["lost 73"] * 3 + ["won"]


def test_the_second_is_told_who_the_first_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "417")
    with locked(tmp_path) as first:
        assert first.held()
        with pytest.raises(LockedError, match=rf"run_dir: .* - process {os.getpid()} of job 417 on \S+ writes into it"):
            Lock(tmp_path).take()
    with locked(tmp_path):
        pass
    assert list((tmp_path / ".lock").iterdir()) == []


def test_a_killed_holder_is_gone_at_once(tmp_path: Path) -> None:
    code = f"from llm.lock import Lock; Lock({str(tmp_path)!r}).take(); print(flush=True); import time; time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(LockedError, match=f"process {holder.pid} on "):
            Lock(tmp_path).take()
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # not even reaped
        Lock(tmp_path).take()


def written(run_dir: Path, holder: Holder) -> Path:
    (run_dir / ".lock").mkdir(exist_ok=True)
    file = run_dir / ".lock" / "00000004.json"
    file.write_text(json.dumps(asdict(holder)))
    return file


ME = Holder.this()
GONE = {
    "another process has the id": replace(ME, started=ME.started - 1),
    "no such process": replace(ME, pid=2**22 + 1),
    "the host was booted since": replace(ME, boot="another"),
    "SLURM requeued the job": replace(ME, host="elsewhere", job="9", restart=0),
}


@pytest.mark.parametrize("why", GONE)
def test_who_is_gone_by_all_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if "SLURM" in why:
        monkeypatch.setenv("SLURM_JOB_ID", "9")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    written(tmp_path, GONE[why])
    with locked(tmp_path) as mine:
        assert mine.file is not None
        assert mine.file.name == "00000005.json"
        assert [path.name for path in mine.folder.iterdir()] == ["00000005.json"]


ELSEWHERE = {
    "another host": replace(ME, host="elsewhere"),
    "another container of the host": replace(ME, namespace="pid:[1]", pid=2**22 + 1),
}


@pytest.mark.parametrize("who", ELSEWHERE)
def test_who_cannot_be_seen_is_gone_when_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(lock, "SILENCE_S", 0.2)
    file = written(tmp_path, ELSEWHERE[who])
    with locked(tmp_path):
        pass
    file = written(tmp_path, ELSEWHERE[who])
    beating = Lock(tmp_path)
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    import threading

    threading.Thread(target=beating._beat, args=(file,), daemon=True).start()
    with pytest.raises(LockedError, match="on "):
        Lock(tmp_path).take()
    beating._stop.set()


def test_a_lock_without_content_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making and writing, where there are no links; but not for ever."""
    monkeypatch.setattr(lock, "SILENCE_S", 0.1)
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000000.json").touch()
    with locked(tmp_path):
        pass


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with locked(tmp_path), pytest.raises(LockedError):
        Lock(tmp_path).take()


def test_who_was_taken_for_dead_knows(tmp_path: Path) -> None:
    with locked(tmp_path) as first:
        (first.folder / "00000009.json").write_text(json.dumps(asdict(ME)))
        assert not first.held()
        with pytest.raises(LockedError):
            first.still()
    assert [path.name for path in (tmp_path / ".lock").glob("*9.json")] == ["00000009.json"]
