"""What a run is called, and what its root holds."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from llm.config import Run, run_id


def test_given_id_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RUN_ID", "given")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert run_id() == "given"


def test_slurm_job_names_the_run_so_that_a_requeued_job_finds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_RUN_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    assert run_id() == "19"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run_id() == "17_2"


def test_made_id_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RUN_ID", "")  # so that monkeypatch puts back what run_id() sets
    made = run_id()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{4}", made)
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.environ['LLM_RUN_ID'])"], capture_output=True, text=True, check=True
    )
    assert run_id() == child.stdout.strip() == made


def test_job_of_a_sweep_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = OmegaConf.structured(Run)
    assert cfg.run_dir == "runs/id"
    job = OmegaConf.create({"mode": "MULTIRUN", "job": {"num": 3}})
    job.mode = RunMode.MULTIRUN
    monkeypatch.setattr(HydraConfig.instance(), "cfg", SimpleNamespace(hydra=job))
    assert cfg.run_dir == "runs/id/3"
    job.job.num = "???"
    assert cfg.run_dir == "runs/id"


def test_what_lies_in_a_folder_is_a_group() -> None:
    names = OmegaConf.create({"run_name": "lr/0", "group": "${run_group:${run_name}}"})
    assert names.group == "lr"
    names.run_name = "alone"
    assert names.group is None


def test_misspelt_group_does_not_merge() -> None:
    with pytest.raises(ConfigKeyError, match="trainr"):
        OmegaConf.merge(OmegaConf.structured(Run), {"trainr": {"max_steps": 5}})


def test_importing_the_package_loads_no_torch() -> None:
    code = "import llm.config, sys; print([m for m in ('torch', 'lightning', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
