"""The run that tests train: seconds long, and using every part of the path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from llm.checkpoint import find, read_state, read_tensors
from llm.config import register
from llm.run import Outcome, run
from tests.ranks import run_on_ranks

CONF = Path(__file__).parents[1] / "conf"

# A run of seconds: bytes as tokens, two small layers, dropout on, several micro-batches, fp32, nothing but the record.
TINY = (
    "data=files",
    "tokenizer=bytes",
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.ffn_dim=64",
    "model.dropout=0.1",
    "data.max_length=32",
    "data.batch_size=8",
    "data.micro_batch_size=4",
    "optimizer=adamw",
    "schedule.warmup_steps=2",
    "trainer.max_steps=6",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.val_check_interval=3",
    "callback.metrics.every_n_steps=2",
    "callback.checkpoint.every_n_train_steps=100",
    "callback.sample.max_new_tokens=8",
    "logger=none",
    "~callback.watchdog",
)

# The same run for the other two, with all that is special about them.
FAMILIES = {
    "encoder": [
        "model=tiny_encoder",
        "model.next_sentence=true",
        "objective=masked_lm",
        "tokenizer=wordpiece",
        "tokenizer.vocab_size=120",
        "data/tasks=masked_lm",
        "data.tasks.masked_lm.next_sentence=true",
    ],
    "encoder-decoder": [
        "model=tiny_encoder_decoder",
        "model.n_decoder_layers=1",
        "objective=seq2seq",
        "tokenizer=unigram",
        "tokenizer.vocab_size=60",
        "tokenizer.n_sentinels=20",
        "data/tasks=span_denoising",
    ],
}

Compose = Callable[..., DictConfig]


def saved(path: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run, or a step directory, holds: plain data, `state_dict`, and `optimizer`, the
    tensors by parameter and key."""
    step = find(path)
    tensors = read_tensors(step)
    weights = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    return {**read_state(step), "state_dict": weights, "optimizer": {n: tensors[n] for n in tensors.keys() - weights}}


def rows(run_dir: Path) -> list[dict[str, float]]:
    """What a run recorded, without the speed."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines]


def composed(overrides: Sequence[str], base: Sequence[str] = TINY) -> DictConfig:
    """The tiny run, or another `base`, with `overrides`."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*base, "run_name=test", *overrides])


def run_composed(overrides: list[str]) -> Outcome:
    """Compose the tiny run with `overrides` and run it, in this process: for ranks, which each do so."""
    return run(composed(overrides))


def run_registered(cfg: DictConfig) -> Outcome:
    """Run what another process composed."""
    register()
    return run(cfg)


def run_together(n: int, overrides: list[str]) -> list[Outcome]:
    """Run the tiny run with `overrides` on n ranks. It is composed here: in each of them it would take longer than
    some of these runs do."""
    return run_on_ranks(run_registered, n, composed(overrides))
