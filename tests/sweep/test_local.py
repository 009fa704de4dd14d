"""The jobs of a sweep on this machine: what each is told, what becomes of the others, and going on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from llm.config import ConfigError, quoted
from llm.submit.record import Job, Record
from llm.sweep import Local
from llm.sweep.local import _share
from tests.sweep.conftest import Start, ran, rows

Sweep = Callable[..., tuple[int, str]]


def test_a_job_that_fails_ends_no_other_and_what_is_done_is_not_done_again(sweep: Sweep) -> None:
    """One fails, one leaves no metric, one is pruned. The same command starts again what is not done."""
    command = ("run_name=a", "optimizer.lr=3.2e-3", "seed=0,13,14,16,1", "model.dim=64")
    code, said = sweep(*command)
    assert code == 1
    found = rows(said)
    assert [row[1] for row in found] == ["0", "13", "14", "16", "1"]
    assert [row[2] for row in found] == ["2.65223e-05", "failed", "failed", "2.65223e-05", "2.65223e-05"]
    assert "failed    65: data.path: missing.jsonl - no such file" in said
    assert "summary.json: val/loss - not there - there is steps, train/loss" in said
    assert "pruned    at step 1" in said
    assert "5 jobs: 2 finished, 2 failed, 1 pruned; best: job 0, val/loss 2.65223e-05" in said
    assert [row["job"] for row in ran()] == ["0", "1", "2", "3", "4"]
    again, said_again = sweep(*command)
    assert again == 1
    assert "3 of 5 jobs are done already" in said_again
    assert [row["job"] for row in ran()[5:]] == ["1", "2"]
    assert rows(said_again) == found
    assert "1 mistake" in Path("runs/a/log-1.txt").read_text()


def test_what_a_job_is_told(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command line of its own, in Hydra's words; its share of the machine; and the name of no other run."""
    monkeypatch.setenv("LLM_RUN_ID", "outer")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    machine = ("hydra.launcher.n_jobs=2", "hydra.launcher.gpus_per_job=2")
    code, said = sweep(*machine, "run_name='odd name'", "optimizer.lr=1e-3,2e-3", "+data.note='a b,c'")
    assert code == 0, said
    first, second = sorted(ran(), key=lambda row: row["job"])
    assert first["words"] == ["hydra.job.num=0", "optimizer.lr=0.001", "+data.note='a b,c'", "run_name='odd name/0'"]
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("4,5", "6,7")
    assert (first["LLM_RUN_ID"], second["LLM_RUN_ID"]) == (None, None)
    mine = sorted(os.sched_getaffinity(0))
    assert set(first["cores"]) | set(second["cores"]) == set(mine)
    assert len(mine) == 1 or not set(first["cores"]) & set(second["cores"])
    with pytest.raises(ConfigError, match=r"gpus_per_job: 3 - 2 jobs at once take 6 GPUs, and CUDA_VIS"):
        Local("val/loss", 2, 3)._environment(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("llm.sweep.local._DRIVER", tmp_path / "gpus")
    assert [Local("val/loss", 2, 2)._environment(place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["0,1", "2,3"]
    for n in range(3):
        (tmp_path / "gpus" / str(n)).mkdir(parents=True)
    assert Local("val/loss", 3, 1)._environment(2)["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(ConfigError, match=r"gpus_per_job: 2 - 2 jobs at once take 4 GPUs, and this machine has 3"):
        Local("val/loss", 2, 2)._environment(0)


@pytest.mark.parametrize("n_places", [1, 2, 3, 8])
def test_cores_are_shared_out(n_places: int) -> None:
    shares = [_share([0, 1, 4, 5], place, n_places) for place in range(n_places)]
    assert all(shares)
    assert set().union(*shares) == {0, 1, 4, 5}
    assert n_places > 4 or sum(map(len, shares)) == 4


def test_a_run_dir_of_ones_own(sweep: Sweep, tmp_path: Path) -> None:
    code, said = sweep(f"run_dir={tmp_path}/else where", "seed=1,2")
    assert code == 0, said
    assert json.loads((tmp_path / "else where" / "1" / "exit.json").read_text())["code"] == 0
    assert f"run_dir='{tmp_path}/else where/1'" in ran()[1]["words"]


def test_another_command_is_not_the_same_sweep(sweep: Sweep) -> None:
    """More values may be added behind; where a job runs is not what it is."""
    assert sweep("run_name=a", "model.dim=64", "optimizer.lr=1e-3,2e-3")[0] == 0
    code, said = sweep("run_name=a", "model.dim=64", "optimizer.lr=1e-3,4e-3", "cluster=cpu")
    assert code == 64
    rule = "runs/a/1: optimizer.lr=0.004 - was a job with optimizer.lr=0.002"
    assert f"{rule} - a sweep goes on with the command that began it; give another run_name" in said
    assert len(ran()) == 2
    assert sweep("cluster=cpu", "optimizer.lr=1e-3,2e-3,4e-3", "model.dim=64", "run_name=a")[0] == 0, (
        "in another order it is the same"
    )
    assert len(ran()) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_told_to_go(start: Start, sweep: Sweep, number: signal.Signals, code: int) -> None:
    """Jobs are told, none is started any more, and the same command goes on."""
    command = ("run_name=a", "hydra.launcher.n_jobs=2", "seed=15,15,1", "optimizer.lr=1e-3")
    process = start(*command)
    logs = [Path(f"runs/a/log-{n}.txt") for n in (0, 1)]
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in logs]
    assert all(" started: seed=15" in text for text in said)
    _until_ready(logs)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == code, rest
    assert rest.count(f"interrupted: {code}: told to go") == 2
    assert f"{number.name}: the jobs have left, 1 were not started; the same command goes on" in rest
    assert len(ran()) == 2
    if number == signal.SIGINT:
        again, text = sweep(*command)
        assert again == 0, text
        assert sorted(row["job"] for row in ran()) == ["0", "0", "1", "1", "2"]


def test_killed_jobs_do_not_outlive_their_sweep(start: Start, sweep: Sweep) -> None:
    process = start("run_name=a", "seed=1,15,2", "optimizer.lr=1e-3")
    _until_ready([Path("runs/a/log-1.txt")])
    (child,) = _children(process.pid)
    process.kill()
    process.wait()
    _gone(child)
    Path("runs/a/1/saved").touch()
    code, said = sweep("run_name=a", "seed=1,15,2", "optimizer.lr=1e-3")
    assert code == 0
    assert "1 of 3 jobs are done already" in said
    assert [row["job"] for row in ran()] == ["0", "1", "1", "2"]
    assert [row[1:] for row in rows(said)] == [[seed, "0.25", "finished"] for seed in ("1", "15", "2")]


def test_a_sweep_among_ranks_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    code, said = sweep("run_name=a", "seed=1,2")
    assert code == 64
    assert "-m: one of the 2 processes of environment cannot be many runs - python train.py -m … starts" in said


def test_a_record_that_a_crash_cut_short(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.enter([Job(0, ["seed=1"])])
    with record.path.open("a") as file:
        file.write('{"started": 0, "lo')
    assert not record.read().jobs[0].started
    record.ended(0, None, "NODE_FAIL")
    assert record.read().jobs[0].cause == "NODE_FAIL"
    with pytest.raises(ConfigError, match="nothing more - was a job with seed=1"):
        record.enter([Job(0, [])])


@pytest.mark.parametrize("text", ["lr/0", "a b", "it's", 'say "x"', "a,b=c", "back\\", "ä/0", "${x}"])
def test_values_are_quoted_as_hydra_reads_them(text: str) -> None:
    override = OverridesParser.create().parse_override(f"run_name={quoted(text)}")
    assert str(override.value()) == text or getattr(override.value(), "text", None) == text


def _until_ready(logs: list[Path]) -> None:
    """Jobs say so when they wait; the pipe between is a file, so it has to be looked at again and again."""
    import time

    deadline = time.monotonic() + 30
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, [log.read_text() for log in logs if log.exists()]
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _gone(pid: int) -> None:
    import time

    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.01)
