"""The rules between groups, and between a run and the checkpoint that it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from llm.checkpoint import find, newest, read
from llm.config import ConfigError
from llm.data import TextData
from llm.model import TransformerConfig
from llm.tokenizer import Tokenizer

# What of a model may change in the middle of a run: everything else is in the shape or the meaning of its weights.
_FREE = {"dropout", "initialisation"}


def agree(cfg: DictConfig, model: TransformerConfig, data: TextData) -> None:
    """Compare the groups with each other and with this machine.

    Raises:
        ConfigError: with one line for each rule that does not hold.
        CheckpointError: if `init_from` names no checkpoint.
    """
    mistakes = [*_vocabulary_and_length(model, data), *_devices(cfg)]
    try:
        data.check_world(1)
    except ValueError as error:
        mistakes.append(str(error))
    if cfg.trainer.default_root_dir != cfg.run_dir:
        mistakes.append(
            f"trainer.default_root_dir: {cfg.trainer.default_root_dir} - a run has one place - set run_dir="
        )
    if cfg.resume == "must" and newest(cfg.run_dir) is None:
        mistakes.append(
            f"resume: must - there is no checkpoint in {cfg.run_dir}/checkpoints - give the run's run_name or run_dir"
        )
    if cfg.stage == "validate" and cfg.resume == "never":
        mistakes.append("resume: never - stage=validate needs weights - set resume to a run or step directory")
    if mistakes:
        raise ConfigError(mistakes)
    if cfg.init_from is not None:
        find(cfg.init_from)


def agree_with_checkpoint(cfg: DictConfig, data: TextData, checkpoint: Path) -> None:
    """Whether the run that `checkpoint` was taken from is the one that `cfg` describes; before anything is written.

    Raises:
        ConfigError: with one line for each key of the model, objective or optimizer that is another one.
        DataError: if batch N would not hold the same tokens as before.
    """
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    pairs = [(f"model.{key}", saved["model"].get(key), now["model"].get(key)) for key in now["model"]]
    pairs += [
        (f"{group}._target_", saved[group]["_target_"], now[group]["_target_"]) for group in ("objective", "optimizer")
    ]
    mistakes = [
        f"{key}: {new} - {checkpoint} has {old} - restore it, or start another run from these weights with init_from="
        for key, old, new in pairs
        if new != old and key.partition(".")[2] not in _FREE
    ]
    if mistakes:
        raise ConfigError(mistakes)
    data.check_resume(read(checkpoint)[type(data).__qualname__])


def agree_with_weights(data: TextData, init_from: str) -> None:
    """Whether the tokens of the data are those that the weights were trained on.

    Raises:
        ConfigError: if the tokenizers differ: the shapes may fit, the meaning of the embeddings does not.
    """
    folder = find(init_from) / "tokenizer"
    if Tokenizer.load(folder).fingerprint != data.tokenizer.fingerprint:
        raise ConfigError(
            [
                f"init_from: {init_from} - its tokenizer is not that of the data - "
                f"write tokenizer=pretrained tokenizer.path={folder}"
            ]
        )


def vocab_size(data: TextData) -> int:
    """How many ids the tokenizer has, or will have at most once it is trained.

    Raises:
        ConfigError: if it is a folder that holds no tokenizer.
    """
    try:
        return data.recipe.vocab_size
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _vocabulary_and_length(model: TransformerConfig, data: TextData) -> list[str]:
    mistakes = []
    if vocab_size(data) > (model.vocab_size or 0):
        mistakes.append(
            f"model.vocab_size: {model.vocab_size} - the tokenizer has {vocab_size(data)} ids - "
            f"give at least that, or null to take the tokenizer's"
        )
    if data.max_length > model.max_length:
        mistakes.append(
            f"data.max_length: {data.max_length} - the model's context is model.max_length={model.max_length} - "
            f"shorten the first or raise the second"
        )
    return mistakes


def _devices(cfg: DictConfig) -> list[str]:
    mistakes = []
    n_devices, n_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if cfg.strategy._target_.endswith(".Single") and (n_devices, n_nodes) not in ((1, 1), ("auto", 1)):
        mistakes.append(
            f"trainer.devices: {n_devices} on {n_nodes} nodes - strategy=single drives one device - "
            f"set trainer.devices=1 and trainer.num_nodes=1"
        )
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        mistakes.append(
            f"trainer.accelerator: {cfg.trainer.accelerator} - torch sees no GPU here - set trainer.accelerator=cpu"
        )
    return mistakes
