"""The rules between groups, and between a run and the checkpoint that it continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from llm.checkpoint import configuration_at, disagreements, labels_of, newest, read_state, tokenizer_at, weights_at
from llm.config import ConfigError
from llm.data import TextData
from llm.launch import Place
from llm.model import TransformerConfig, config_from, node_of
from llm.tokenizer import Tokenizer

# What of a model may change in the middle of a run: everything else is in the shape or the meaning of its weights.
_FREE = {"dropout", "initialisation"}
_OF_ADAPTER = ("r", "alpha", "layers")


class Strategy(Protocol):
    """What the strategies have to say about a run before it is built."""

    def n_data_processes(self, world_size: int) -> int:
        """How many of the processes have data of their own."""

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why so many processes cannot train `model`, on rows of several documents or not."""


def agree(
    cfg: DictConfig, model: TransformerConfig, data: TextData, strategy: Strategy, here: Place | None, objective: type
) -> None:
    """Compare the groups with each other, with this machine and with the processes that were started.

    Of the `objective` the class is looked at: which family of models it trains, and what it predicts. Of a run that
    will be elsewhere, `here` is None, and this machine does not matter.

    Raises:
        ConfigError: with one line for each rule that does not hold.
        CheckpointError: if `init_from` names no checkpoint.
    """
    mistakes = [*_vocabulary_and_length(model, data), *_family(model, data, objective)]
    mistakes += _numbered(cfg) or ([] if here is None else _devices(cfg))
    world_size = _n_devices(cfg) * cfg.trainer.num_nodes
    problems = strategy.problems(
        model, world_size, cfg.trainer.accelerator, cfg.trainer.precision, data.tells_documents
    )
    mistakes += problems or ([] if here is None else _processes(cfg, here))
    try:
        data.check_world(strategy.n_data_processes(world_size))
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
    mistakes += [*_adapter(cfg, model), *_preference(cfg, data)]
    if mistakes:
        raise ConfigError(mistakes)
    if cfg.init_from is not None and own_checkpoint(cfg) is None:
        weights = configuration_at(cfg.init_from)
        if weights is not None and model.tie_embeddings:
            # Whether a head of its own is among a folder's weights is only known when they are read.
            weights = replace(weights, tie_embeddings=True)
        mistakes = [] if weights is None else disagreements(model, weights)
        if mistakes:
            raise ConfigError([f"init_from: {cfg.init_from}: {mistake}" for mistake in mistakes])


def agree_with_first(cfg: DictConfig, first: Any) -> None:
    """Whether this process is to do what the first one does: each has composed its configuration by itself.

    Raises:
        ConfigError: with one line for each group or key that differs.
    """
    mine: Any = OmegaConf.to_container(cfg, resolve=True)
    for settings in (mine, first):  # where a node's cache lies is its own affair, and only rank 0 logs
        settings["logger"], settings["trainer"]["logger"], settings["data"]["cache_dir"] = None, None, None
    mistakes = [
        f"{key}: {value} - rank 0 has {first.get(key)} - start all ranks with the same command and files"
        for key, value in mine.items()
        if json.loads(json.dumps(value)) != first.get(key)
    ]
    if mistakes:
        raise ConfigError(mistakes)


def agree_with_checkpoint(cfg: DictConfig, data: TextData, checkpoint: Path) -> None:
    """Whether the run that `checkpoint` was taken from is the one that `cfg` describes; before anything is written.

    Raises:
        ConfigError: with one line for each key of the model, adapter, objective or optimizer that is another one, and
            for weights alone, which no run can go on from.
        DataError: if batch N would not hold the same tokens as before.
    """
    saved, state = _settings_of(checkpoint), read_state(checkpoint).get(type(data).__qualname__)
    if "objective" not in saved or state is None:
        raise ConfigError(
            [f"resume: {checkpoint} - holds weights and no run - start one from them with init_from={checkpoint}"]
        )
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    kinds = [(f"{group}._target_", saved[group], now[group]) for group in ("objective", "optimizer")]
    pairs = [(key, old["_target_"], new["_target_"]) for key, old, new in kinds]
    remedy = "restore it, or start another run from these weights with init_from="
    _same(checkpoint, [*_network(saved, now), *pairs], remedy)
    data.check_resume(state)


def agree_with_network(cfg: DictConfig, data: TextData, checkpoint: Path) -> None:
    """Whether the network and the tokenizer that `cfg` describes are those of `checkpoint`, whose weights are to be
    validated.

    Raises:
        ConfigError: with one line for each key that is another one.
    """
    pairs = _network(_settings_of(checkpoint), OmegaConf.to_container(cfg, resolve=True))
    known = labels_of(checkpoint)[0]
    if known and data.n_labels is not None:
        pairs.append(("data.tasks: labels", known, data.labels))
    _same(checkpoint, pairs, "restore it: the weights are of that network")
    agree_with_weights(data, str(checkpoint), "resume")


def began_with(cfg: DictConfig, data: TextData, checkpoint: Path | None) -> str | None:
    """Where the weights of step 0 lie: the step directory or folder that `init_from` means, or, of a run that goes on
    from `checkpoint`, meant when it began. A run that was named may have gone on since.

    Raises:
        ConfigError: if what a preference is measured against was another one.
        CheckpointError: if a run that begins finds no weights there.
    """
    if cfg.init_from is None:
        return None
    if checkpoint is None:
        return str(weights_at(cfg.init_from).resolve())
    began = _settings_of(checkpoint).get("init_from")
    if began is None:
        return str(cfg.init_from)
    named = Path(cfg.init_from).resolve()
    if cfg.adapter is None and data.answers == "preference" and not Path(began).is_relative_to(named):
        raise ConfigError(
            [
                f"init_from: {cfg.init_from} - the run of {checkpoint} is measured against {began} - set it to that, "
                "or start another run"
            ]
        )
    return str(began)


def own_checkpoint(cfg: DictConfig) -> Path | None:
    """The newest of the run itself, which goes on from there: where its weights came from does not matter any more."""
    return None if cfg.resume == "never" else newest(cfg.run_dir)


def agree_with_weights(data: TextData, weights: str, key: str = "init_from") -> None:
    """Whether the tokens of the data are those that the weights were trained on, where those came with a tokenizer.

    Raises:
        ConfigError: if the tokenizers differ: the shapes may fit, the meaning of the embeddings does not.
    """
    folder = tokenizer_at(weights)
    if folder is not None and Tokenizer.load(folder).fingerprint != data.tokenizer.fingerprint:
        raise ConfigError(
            [
                f"{key}: {weights} - its tokenizer is not that of the data - "
                f"write tokenizer=pretrained tokenizer.path={folder}"
            ]
        )


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((checkpoint / "config.yaml").read_text())
    return settings


def _network(saved: dict[str, Any], now: Any) -> list[tuple[str, Any, Any]]:
    """Key, what it was and what it is, of all that gives weights their meaning."""
    was, model = (node_of(config_from(settings["model"])) for settings in (saved, now))  # with what was left out
    old, new = (settings.get("adapter") or {} for settings in (saved, now))
    pairs = [(f"model.{key}", was[key], model[key]) for key in model if key not in _FREE]
    return pairs + [(f"adapter.{key}", old.get(key), new.get(key)) for key in _OF_ADAPTER]


def _same(checkpoint: Path, pairs: list[tuple[str, Any, Any]], remedy: str) -> None:
    mistakes = [f"{key}: {new} - {checkpoint} has {old} - {remedy}" for key, old, new in pairs if new != old]
    if mistakes:
        raise ConfigError(mistakes)


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
    if (data.target_length or 0) > model.max_length:
        mistakes.append(
            f"data.target_length: {data.target_length} - the model's context is model.max_length={model.max_length} - "
            f"shorten the first or raise the second"
        )
    return mistakes


def _family(model: TransformerConfig, data: TextData, objective: type) -> list[str]:
    """Whether rows of the data are what the model reads and the objective trains, and all of the model is trained."""
    trained = getattr(objective, "family", None)
    mistakes = _answers(model, data, getattr(objective, "answers", "vocabulary"))
    if trained not in (None, model.family):
        mistakes.append(
            f"objective: trains a model.family={trained} - the model has {model.family} - take another objective= or "
            f"model=; experiment=gpt_pretrain, bert_pretrain, t5_pretrain fit"
        )
    if data.family != model.family:
        mistakes.append(
            f"model.family: {model.family} - data.tasks ({', '.join(data.task_names)}) make rows for {data.family} - "
            f"take another model=, objective= or data/tasks=; experiment=gpt_pretrain, bert_pretrain, t5_pretrain fit"
        )
    elif model.next_sentence != data.has_pairs:
        mistakes.append(
            f"model.next_sentence: {model.next_sentence} - data.tasks make {'' if data.has_pairs else 'no '}pairs "
            f"(next_sentence of masked_lm) - set both or none"
        )
    return mistakes


def _adapter(cfg: DictConfig, model: TransformerConfig) -> list[str]:
    """Whether there is something to adapt, and nothing else replaces the same layers."""
    if cfg.adapter is None:
        return []
    mistakes = []
    if cfg.init_from is None:  # also of a run that goes on: it says which heads are trained beside the adapter
        mistakes.append("adapter: changes weights that are there - init_from is null - set it to a folder or a run")
    if "gate" in cfg.adapter.layers and not model.gated:
        mistakes.append(f"adapter.layers: gate - model.activation={model.activation} has none - leave it out")
    if cfg.strategy.get("float8"):
        mistakes.append(
            "adapter: beside strategy.float8 - both replace linear layers - set one of them to null or false"
        )
    if cfg.strategy.get("tensor_parallel_size", 1) > 1:
        mistakes.append("adapter: beside strategy.tensor_parallel_size - its layers cannot be split yet - set it to 1")
    return mistakes


def _preference(cfg: DictConfig, data: TextData) -> list[str]:
    """Whether there is something to prefer over, and whether the answers of a row can be told apart."""
    if data.answers != "preference":
        return []
    mistakes = []
    if cfg.init_from is None:
        mistakes.append(
            "init_from: null - a preference is measured against the weights that training starts from - "
            "set it to a folder or a run"
        )
    if not data.tells_documents:
        mistakes.append("data.document_mask: false - pairs of answers are told apart by it - set it to true")
    return mistakes


def label_of(data: TextData) -> Literal["text", "token"]:
    """What a model for this data puts its labels on, as model.label_of has it."""
    return "text" if data.answers in ("vocabulary", "label", "preference") else "token"


def _answers(model: TransformerConfig, data: TextData, chosen: str) -> list[str]:
    """Whether all three choose from the same: the vocabulary, or as many labels."""
    tasks = ", ".join(data.task_names)
    if chosen != data.answers:
        return [
            f"objective: chooses {_CHOSEN[chosen]} - data.tasks ({tasks}) want {_CHOSEN[data.answers]} - "
            f"take objective={_OBJECTIVES[data.answers]}, or another data/tasks="
        ]
    if model.n_labels != data.n_labels:
        return [
            f"model.n_labels: {model.n_labels} - data.tasks ({tasks}) have {data.n_labels or 'no labels'} - "
            "set it to null, which takes theirs"
        ]
    if model.n_labels is not None and model.label_of != label_of(data):
        return [
            f"model.label_of: {model.label_of} - data.tasks ({tasks}) have labels of each {label_of(data)} - "
            f"set it to {label_of(data)}"
        ]
    return []


# What answers are made of, and who makes them.
_CHOSEN = {"vocabulary": "tokens", "label": "a label", "tags": "a label for each word", "span": "a part of a text"}
_CHOSEN["preference"] = "one of two texts"
_OBJECTIVES = {
    "vocabulary": "causal_lm, masked_lm or seq2seq",
    "label": "classification",
    "tags": "token_classification",
    "span": "span_extraction",
    "preference": "preference",
}


def _n_devices(cfg: DictConfig) -> int:
    """What trainer.devices comes to in each node."""
    wanted = cfg.trainer.devices
    if isinstance(wanted, int) and wanted > 0:
        return wanted
    if wanted in ("auto", -1):
        return max(1, torch.cuda.device_count()) if cfg.trainer.accelerator != "cpu" else 1
    return max(1, len(wanted))  # of none, which is a mistake, something that others can be judged with


def _numbered(cfg: DictConfig) -> list[str]:
    """Whether trainer.devices is a number where devices have none of their own."""
    wanted = cfg.trainer.devices
    if wanted == []:
        return ["trainer.devices: [] - names no device - give how many each node is to have"]
    if cfg.trainer.accelerator == "cpu" and wanted != "auto" and (wanted == -1 or not isinstance(wanted, int)):
        return [f"trainer.devices: {wanted} - a CPU is not several - give a number of processes, as trainer.devices=2"]
    return []


def _devices(cfg: DictConfig) -> list[str]:
    """The machine against what is asked of it; on a CPU processes may outnumber the cores."""
    accelerator, n_gpus = cfg.trainer.accelerator, torch.cuda.device_count()
    if accelerator not in ("gpu", "cuda"):
        return []
    if not torch.cuda.is_available():
        return [f"trainer.accelerator: {accelerator} - torch sees no GPU here - set trainer.accelerator=cpu"]
    if _n_devices(cfg) > n_gpus:
        return [
            f"trainer.devices: {cfg.trainer.devices} - this machine has {n_gpus} GPUs - set trainer.devices={n_gpus}"
        ]
    return []


def _processes(cfg: DictConfig, here: Place) -> list[str]:
    """Whether as many processes were started as the configuration counts on."""
    n_devices, n_nodes = _n_devices(cfg), cfg.trainer.num_nodes
    if here.world_size == n_devices * n_nodes:
        return []
    how = {
        "none": "python train.py starts them, and so do torchrun and srun; a Python program that calls run() does not",
        "launch": "start python train.py once on each node",
        "torchrun": f"start torchrun with --nnodes={n_nodes} --nproc-per-node={n_devices}, or change the two keys",
        "srun": f"start srun with --nodes={n_nodes} --ntasks-per-node={n_devices}, or change the two keys",
        "environment": "WORLD_SIZE says how many there are: change it or the two keys, or unset RANK, LOCAL_RANK and "
        "WORLD_SIZE if they are left from another program",
    }[here.launcher]
    return [
        f"trainer.devices x trainer.num_nodes: {n_devices} x {n_nodes} - this process is one of {here.world_size} "
        f"({here.launcher}) - {how}"
    ]
