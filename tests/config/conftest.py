"""A tree of configurations as small as a run can have, over the classes of toyhouse.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from llm.config import ConfigError, check, check_overrides, register

HERE = Path(__file__).parent

TRAIN = """
defaults:
  - run
  - model: small
  - optimizer: adam
  - schedule: linear
  - trainer: default
  - _self_
  - experiment: null
  - override hydra/job_logging: none

tokenizer: {_target_: toyhouse.Open}
data: {_target_: toyhouse.Open}
objective: {_target_: toyhouse.Open, model: "${model}"}
strategy: {_target_: toyhouse.Open}
guard: {_target_: toyhouse.Open}
callback: {sample: {_target_: toyhouse.Open, name: sample}}
packages: [toyhouse]
hydra:
  output_subdir: null
  run: {dir: .}
  sweep: {dir: "runs/${oc.env:LLM_RUN_ID}", subdir: .}
"""
FILES = {
    "train.yaml": TRAIN,
    "model/small.yaml": "_target_: toyhouse.Net\ndim: 8\nn_heads: 2\n",
    "model/large.yaml": "_target_: toyhouse.Net\ndim: 512\nn_heads: 8\n",
    "optimizer/adam.yaml": "_target_: toyhouse.Optimizer\nlr: 1e-3\nbetas: [0.9, 0.95]\n",
    "schedule/linear.yaml": "_target_: toyhouse.Linear\nwarmup_steps: 0\nmax_steps: ${trainer.max_steps}\n",
    "trainer/default.yaml": (
        "_target_: toyhouse.Trainer\nmax_steps: 10\nmax_tokens: null\nmax_epochs: null\nprecision: bf16-mixed\n"
        "use_distributed_sampler: false\ncheck_val_every_n_epoch: null\n"
    ),
    "experiment/wide.yaml": "# @package _global_\ndefaults:\n  - override /model: large\nmodel: {dropout: 0.1}\n",
    "experiment/misspelt.yaml": "# @package _global_\ntrainr: {max_steps: 5}\noptimiser: {lr: 1}\nseed: 1\n",
    "experiment/missing.yaml": "# @package _global_\ndefaults:\n  - override /model: huge\n",
    "experiment/broken.yaml": "# @package _global_\nseed: [1\n",
}


@pytest.fixture(autouse=True)
def _toyhouse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    for name in ("LLM_RUN_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLM_RUN_ID", "id")
    register()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


@pytest.fixture
def mistakes() -> Callable[[dict[str, Any]], list[str]]:
    """The mistakes of one configuration, given as nodes; toyhouse is allowed."""

    def found(nodes: dict[str, Any]) -> list[str]:
        cfg: DictConfig = OmegaConf.create({"packages": ["toyhouse"], **nodes})
        try:
            check(cfg)
        except ConfigError as error:
            return error.mistakes
        return []

    return found


@pytest.fixture
def refused(conf: Path) -> Callable[..., list[str]]:
    """The mistakes of a command line."""

    def found(*argv: str) -> list[str]:
        try:
            check_overrides(argv, conf)
        except ConfigError as error:
            return error.mistakes
        return []

    return found
