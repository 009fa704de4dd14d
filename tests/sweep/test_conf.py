"""conf/hydra: every file is a launcher or sweeper that Hydra builds, and what is wrong with a key is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from llm import sweep
from llm.config import ConfigError, check_overrides, register
from tests.sweep.fake import CONF

FILES = sorted((path.parent.name, path.stem) for path in (CONF / "hydra").glob("*/*.yaml"))
LIGHT = ("tokenizer=bytes", "data=files", "data.path=x")


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    sweep.register()


def mistakes(*argv: str) -> list[str]:
    try:
        check_overrides(["-m", *LIGHT, *argv], CONF, elsewhere=lambda cfg: True)
    except ConfigError as error:
        return error.mistakes
    return []


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_file_is_a_plugin(group: str, choice: str) -> None:
    """Built as Hydra builds it, with a value for every argument: YAML and signature say the same."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: Any = compose("train", [f"hydra/{group}={choice}", "run_name=a"], return_hydra_config=True)
    node = cfg.hydra[group]
    built = Plugins.instance()._instantiate(node)
    assert type(built).__module__.startswith("llm.sweep.")
    for name, value in node.items():
        if name != "_target_":
            assert getattr(built, str(name)) == value, name


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["hydra/launcher=slrum"], ["hydra/launcher: slrum - no such choice - did you mean hydra/launcher=slurm?"]),
        (
            [
                *("hydra.launcher.n_jobs=0", "hydra.launcher.n_job=2", "+hydra.launcher.gpus=1", "run_name=a,b"),
                *("run_dir='x/${hydra:job.num}'", "optimizer.lr=interval(0.1,1)", "model.dmi=1"),
            ],
            [
                "hydra.launcher.n_jobs: 0 - must be a whole number at least 1",
                "hydra.launcher.n_job: 2 - no such key - did you mean hydra.launcher.n_jobs?",
                "hydra.launcher.gpus: 1 - llm.sweep.Local has no such argument - it takes",
                "run_name: a,b - names a sweep, whose jobs are that/0, that/1, … - give one",
                "run_dir: 'x/${hydra:job.num}' - names a sweep, whose jobs are that/0",
                "optimizer.lr: interval(0.1,1) - values are drawn from it by a sweeper - add hydra/sweeper=optuna",
                "model.dmi: 1 - no such key",
            ],
        ),
        (
            [
                *(
                    "hydra/launcher=slurm",
                    "hydra/sweeper=optuna",
                    "hydra.launcher.poll_s=0",
                    "hydra.sweeper.sampler=tp",
                ),
                *("hydra.sweeper.n_trials=1.5", "optimizer.lr=interval(-1,1)", "optimizer.lrr=interval(1,2)"),
            ],
            [
                "hydra.launcher.poll_s: 0 - must be a number greater than 0",
                "hydra.sweeper.sampler: 'tp' - must be 'tpe' or 'cmaes'",
                "hydra.sweeper.n_trials: 1.5 - must be a whole number",
                "optimizer.lr: -1.0 - must be a number greater than 0",
                "optimizer.lrr: 1.0 - no such key - did you mean",
            ],
        ),
    ],
    ids=["choice", "local", "optuna on slurm"],
)
def test_what_is_wrong_is_said_at_once(overrides: list[str], told: list[str]) -> None:
    found = mistakes(*overrides)
    missing = [text for text in told if not any(line.startswith(text) for line in found)]
    assert not missing, found


@pytest.mark.parametrize(
    "overrides",
    [
        ["run_name=lr", "optimizer.lr=1e-3,3e-3"],
        ["hydra/sweeper=optuna", "optimizer.lr=tag(log, interval(1e-4, 1e-2))", "model.dim=range(64,129,64)"],
        ["hydra/launcher=basic", "run_name='lr/${hydra:job.num}'", "seed=1,2"],
    ],
)
def test_what_is_right(overrides: list[str]) -> None:
    assert mistakes(*overrides) == []


def test_a_run_in_a_folder_is_of_a_group() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, group in (("lr/3", "lr"), ("alone", None)):
            cfg = compose("train", [f"run_name={name}"])
            assert OmegaConf.select(cfg, "logger.wandb.group") == group
        assert compose("train", ["run_name=lr/3", "logger.wandb.group=mine"]).logger.wandb.group == "mine"


def test_where_hydra_looks_for_them() -> None:
    assert FILES == [("launcher", "local"), ("launcher", "slurm"), ("sweeper", "optuna")]
    assert Path(CONF / "hydra").is_dir()
