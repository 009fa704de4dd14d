"""How many ranks a command line asks for, and which command line each of them gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from llm.launch import job_arguments, ranks_to_start
from llm.launch.place import ALONE, Place
from tests.launch.jobs import ROOT

# train.py, with what it would start printed instead: a line for each job, in which process it would have been.
PROGRAM = """
import json, os, runpy, sys
import llm.launch

def launch(command, n, **options):
    heavy = sorted({"torch", "lightning", "pydantic"} & set(sys.modules))
    print(json.dumps([command, n, options, heavy], default=str))
    return int(os.environ.get("CODE", "0"))

llm.launch.launch = launch
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
TWO = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


def train(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python train.py …` does, up to starting ranks."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *overrides],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def jobs(done: subprocess.CompletedProcess[str]) -> list[list[Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


def configured(target: str = "llm.strategy.DDP", **trainer: object) -> DictConfig:
    return OmegaConf.create({"strategy": {"_target_": target}, "trainer": trainer})


@pytest.mark.parametrize(
    ("trainer", "n"),
    [
        ({"devices": 2, "num_nodes": 1}, 2),
        ({"devices": [0, 3], "num_nodes": 1}, 2),
        ({"devices": 1, "num_nodes": 1}, 0),
        ({"devices": [3], "num_nodes": 1}, 0),
        ({"devices": 1, "num_nodes": 2}, 1),
        ({"devices": "auto", "num_nodes": 1, "accelerator": "cpu"}, 0),
        ({"devices": -1, "num_nodes": 2, "accelerator": "cpu"}, 1),
        ({"accelerator": "cpu"}, 0),
    ],
)
def test_ranks_of_a_node(trainer: dict[str, object], n: int) -> None:
    assert ranks_to_start(configured(**trainer), ALONE) == n


@pytest.mark.parametrize(("n_gpus", "n"), [(0, 0), (1, 0), (4, 4)])
@pytest.mark.parametrize("devices", ["auto", -1])
def test_as_many_as_there_are_gpus(monkeypatch: pytest.MonkeyPatch, devices: object, n_gpus: int, n: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpus)
    assert ranks_to_start(configured(devices=devices, num_nodes=1, accelerator="auto"), ALONE) == n


def test_a_rank_starts_none_and_neither_does_a_single_process() -> None:
    assert ranks_to_start(configured(devices=2), Place(0, 0, 2, 2, 0, "localhost", 1, "torchrun")) == 0
    assert ranks_to_start(configured(devices=2), Place(0, 0, 1, 1, 0, "localhost", 1, "torchrun")) == 0
    assert ranks_to_start(configured("llm.strategy.Single", devices=2, num_nodes=2), ALONE) == 0


def test_one_run_has_the_command_line_as_given() -> None:
    given = ["--config-dir=x", "strategy=ddp", "data.prompts=[a, b]"]
    assert job_arguments(given) == given


def test_the_launcher_loads_no_torch_and_starts_the_same_program() -> None:
    ((command, n, options, heavy),) = jobs(train(*TWO, "run_name='a b'", LLM_RUN_ID="given"))
    assert command == [sys.executable, "-c", PROGRAM, *TWO, "run_name='a b'"]
    assert n == 2
    assert options == {"run_dir": "runs/a b", "n_nodes": 1, "run_id": "given"}
    assert heavy == ["pydantic"]


def test_the_run_id_is_made_once() -> None:
    ((_, _, options, _),) = jobs(train(*TWO, LLM_RUN_ID=""))
    assert options["run_dir"] == f"runs/{options['run_id']}"
    ((_, _, options, _),) = jobs(train(*TWO, "trainer.num_nodes=2", LLM_RUN_ID=""))
    assert options["run_id"] is None  # the launchers of two nodes would make two: the ranks agree on one


def test_a_job_that_fails_ends_the_sweep_of_hydras_own_launcher(tmp_path: Path) -> None:
    sweep = train("-m", "hydra/launcher=basic", *TWO, "seed=1,2", f"hydra.sweep.dir={tmp_path}", CODE="75")
    assert (sweep.returncode, sweep.stdout.count("[[")) == (75, 1)  # the others are for another time


def test_each_job_of_a_sweep_is_a_set_of_processes(tmp_path: Path) -> None:
    """Each gets a command line of its own that composes to that job."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
    sweep = (
        f"--config-dir={tmp_path}",
        "-m",
        "hydra/launcher=basic",
        *TWO,
        "experiment=mine",
        "~callback.sample",
        "optimizer.lr=1e-3,2e-3",
        "run_name='odd name/${hydra:job.num}'",
        f"hydra.sweep.dir={tmp_path}",
    )
    found = jobs(train(*sweep, LLM_RUN_ID="sweep"))
    assert len(found) == 2
    for number, (command, n, options, heavy) in enumerate(found):
        assert (n, heavy, options["run_id"]) == (2, ["pydantic"], f"sweep/{number}")
        composed = train("--cfg", "job", "--resolve", *command[3:], LLM_RUN_ID=options["run_id"])
        assert composed.returncode == 0, composed.stderr
        cfg = yaml.safe_load(composed.stdout)
        assert cfg["run_dir"] == options["run_dir"] == f"runs/odd name/{number}"
        assert (cfg["optimizer"]["lr"], cfg["seed"], cfg["trainer"]["devices"]) == ((1e-3, 2e-3)[number], 5, 2)
        assert "sample" not in cfg["callback"]


def test_a_sweep_among_ranks_is_refused() -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = train("-m", *TWO, "seed=1,2", LLM_RUN_ID="given", **ranks)
    assert done.returncode == 64
    rule = "-m: one of the 2 processes of environment cannot be many runs, one after the other"
    assert f"{rule} - python train.py -m … starts processes for each" in done.stderr


def test_a_mistake_is_told_by_the_first_rank_only() -> None:
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    ours = {**ranks, "LLM_LAUNCHER": str(os.getpid()), "LLM_RUN_ID": "given"}
    told = [train("seeed=1", **ours, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [done.returncode for done in told] == [64, 64]
    assert ["did you mean seed?" in done.stderr for done in told] == [True, False]


def test_stale_variables_are_refused_at_once() -> None:
    done = train(*TWO, RANK="3", WORLD_SIZE="4")
    assert (done.returncode, done.stdout) == (64, "")
    assert "RANK=3 WORLD_SIZE=4: without LOCAL_RANK" in done.stderr


@pytest.mark.parametrize(("flag", "printed"), [("--help", "Groups (group=choice)"), ("--cfg=job", "devices: 2")])
def test_questions_are_answered_by_hydra(flag: str, printed: str) -> None:
    done = train(flag, *TWO)
    assert done.returncode == 0
    assert printed in done.stdout
    assert "[[" not in done.stdout


def test_a_mistake_that_only_lightning_sees_is_told_once() -> None:
    """By a rank, since the launcher does without Lightning."""
    done = subprocess.run(
        [sys.executable, "train.py", *TWO, "callback.metrics.every_n_steps=-1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.count("callback.metrics.every_n_steps: -1") == 1
    assert done.stderr.count("\n") == 2
