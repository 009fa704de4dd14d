"""Weights from a checkpoint, or from a folder of Hugging Face's, into a network."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llm.checkpoint import huggingface
from llm.checkpoint.adapter import PREFIX, adapter_of, is_adapters, merged, plain
from llm.checkpoint.distribute import load_whole, weights_of
from llm.checkpoint.huggingface.settings import meaning
from llm.checkpoint.labels import labels_of
from llm.checkpoint.store import CheckpointError, find, read_tensors
from llm.model import Transformer, TransformerConfig, config_from
from llm.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# What shows in the names and shapes of weights, and is compared there.
_SHAPES = {
    *("dim", "head_dim", "n_kv_heads", "ffn_dim", "vocab_size", "max_length", "n_layers", "n_decoder_layers"),
    *("n_segments", "bias", "head_bias", "next_sentence", "n_labels", "label_of"),
}
# What people change on purpose, to make a context longer.
_CONTEXT = {"rope_theta", "rope_scaling", "local_rope_theta", "window", "windows"}
# What an encoder has no use for, or another one than the encoder-decoder that begins with it.
_NOT_AN_ENCODERS = {"family", "tie_embeddings", "scale_logits"}


def load(path: str | Path) -> tuple[Transformer, Tokenizer]:
    """The network, in eval mode on the CPU, and the tokenizer of a run or step directory.

    Raises:
        CheckpointError: if there is no checkpoint, or it does not fit its own configuration.
    """
    if huggingface.is_folder(path):
        raise CheckpointError(
            f"{path}: is a folder of Hugging Face's - python -m llm import {path} OUT makes a checkpoint"
        )
    step = find(path)
    config, state = stored(step)
    model = Transformer(config)
    _fill(model, state, str(step))
    if not (step / "tokenizer").is_dir():
        raise CheckpointError(f"{step}: holds no tokenizer - copy one to {step / 'tokenizer'}")
    return model.eval(), Tokenizer.load(step / "tokenizer")


def stored(step: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The configuration and the weights of the network in a step directory."""
    node = yaml.safe_load((step / "config.yaml").read_text())["model"]
    config, state = config_from(node), _weights(step)
    adapter = adapter_of(step)
    if adapter is not None:
        state = merged(state, adapter["alpha"] / adapter["r"])
    tied = config.tie_embeddings and config.n_labels is None
    return config, state | ({"head.weight": state["embed.weight"]} if tied else {})


def _known_labels(where: Path) -> list[str]:
    """What the scores of the classifier in a step directory or folder of Hugging Face's are of, where that is said."""
    if huggingface.is_folder(where):
        return huggingface.labels_of(where)
    names, spans = labels_of(where)
    return ["start", "end"] if spans else names


def weights_at(path: str | Path) -> Path:
    """The step directory or folder of Hugging Face's that `path` means.

    Raises:
        CheckpointError: if it is neither.
    """
    return Path(path) if huggingface.is_folder(path) else find(path)


def tokenizer_at(path: str | Path) -> Path | None:
    """The folder of the tokenizer that belongs to the weights at `path`; None if there is none."""
    found = weights_at(path)
    if huggingface.is_folder(found):
        return found if huggingface.tokenizer_of(found) is not None else None
    return found / "tokenizer" if (found / "tokenizer").is_dir() else None


def load_into(model: nn.Module, path: str | Path, labels: Sequence[str] = ()) -> list[str]:
    """Copy the weights at `path` into `model`, all of them and nothing else.

    Of a run or step directory every weight must fit. Of a folder of Hugging Face's, and for a model with labels that
    the checkpoint has not, those of the body must; heads that it lacks keep what they have. So does the classifier, of
    either, where there are more or fewer labels, they are of tokens and not of texts, or `labels`, the names that the
    model's have, are known to be others. The encoder of an encoder-decoder may come from an encoder: its decoder starts
    anew.

    Returns:
        The names of the weights of `model` that start anew, which are logged too.

    Raises:
        CheckpointError: naming every weight that is missing, left over, or of another shape.
    """
    where = weights_at(path)
    unused: list[str] = []
    if huggingface.is_folder(where):
        found = huggingface.read(where)
        config, saved, unused = found.config, found.state, found.unused
    else:
        config, saved = stored(where)
    mistakes = disagreements(getattr(model, "config", None), config)
    if mistakes:
        raise CheckpointError(f"{where}: other weights than this model's\n" + "\n".join(f"  {m}" for m in mistakes))
    mine = getattr(model, "config", config)
    heads = _other_heads(where, mine, config)
    others = _other_labels(mine, config, list(labels), _known_labels(where))
    if others is not None:
        log.warning("%s: its classifier is of other labels, and left: %s", where, others)
        saved = {name: weight for name, weight in saved.items() if not name.startswith("classifier.")}
        heads = True
    return _fill(model, saved, str(where), heads=heads, unused=unused)


def starting_anew(config: TransformerConfig, path: str | Path) -> list[str]:
    """The names of the weights of a network that `load_into` would not find at `path`, a classifier of other labels
    apart; none of the network is needed for that.

    Raises:
        CheckpointError: if there is nothing at `path`, or it is not understood.
    """
    where = weights_at(path)
    if huggingface.is_folder(where):
        found = huggingface.read(where)
        theirs, names = found.config, {*found.state}
    else:
        theirs = config_from(yaml.safe_load((where / "config.yaml").read_text())["model"])
        names = {*huggingface.expected(theirs)}
    with torch.device("meta"):
        wanted = weights_of(Transformer(config))
    return _unlike(wanted, names, heads=_other_heads(where, config, theirs))[0]


def configuration_at(path: str | Path) -> TransformerConfig | None:
    """The configuration of the weights at `path`, as far as it is known without reading them; None: not at all.

    Raises:
        CheckpointError: if there are none, or they are of an architecture that is not known.
    """
    where = weights_at(path)
    if huggingface.is_folder(where):
        return huggingface.configuration(where)
    return config_from(yaml.safe_load((where / "config.yaml").read_text())["model"])


def disagreements(model: Any, weights: TransformerConfig) -> list[str]:
    """One line for each key that gives equal shapes another meaning: weights of one network in another.

    What makes a context longer may differ; a tied embedding may come apart, unless what its scores are multiplied with
    under mup, and a head's of its own are not, would be lost; but two tensors cannot become one.
    """
    if not isinstance(model, TransformerConfig):
        return []
    from_encoder = (weights.family, model.family) == ("encoder", "encoder_decoder")
    if weights.family != model.family and not from_encoder:
        return [
            f"model.family: {model.family} - the weights are of a model.family={weights.family} - take a model= of it"
        ]
    mine, other = meaning(model), meaning(weights)
    skipped = _SHAPES | (_NOT_AN_ENCODERS if from_encoder else set())
    multiplied = weights.growth != 1 and model.n_labels is None and weights.n_labels is None
    if weights.tie_embeddings and not multiplied:
        skipped |= {"tie_embeddings"}
    if weights.n_layers != model.n_layers:
        skipped |= {"windows"}
    different = [key for key in mine if key not in skipped and mine[key] != other[key]]
    for key in _CONTEXT & {*different}:
        log.warning("model.%s: %s, and the weights were trained with %s", key, mine[key], other[key])
    return [
        f"model.{key}: {mine[key]} - the weights have {other[key]} - set it to that"
        for key in different
        if key not in _CONTEXT
    ]


def _other_labels(
    model: TransformerConfig, weights: TransformerConfig, mine: list[str], theirs: list[str]
) -> str | None:
    """How the labels that classifiers of both choose from differ; None: not as far as is known."""
    if model.n_labels is None or weights.n_labels is None:
        return None
    for key in ("n_labels", "label_of"):
        if getattr(model, key) != getattr(weights, key):
            return f"model.{key}: {getattr(model, key)} - the weights have {getattr(weights, key)}"
    if mine and theirs and mine != theirs:
        return f"labels: {', '.join(mine)} - the weights have {', '.join(theirs)}"
    return None


def _weights(step: Path) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): weight for name, weight in read_tensors(step, PREFIX).items()}


def _fill(
    model: nn.Module, saved: dict[str, Tensor], where: str, *, heads: bool = False, unused: list[str] | None = None
) -> list[str]:
    named = {plain(name): name for name in weights_of(model) if not is_adapters(name)}
    wanted = {name: weights_of(model)[whole] for name, whole in named.items()}
    tied = model.state_dict().keys() - weights_of(model).keys()
    saved = {name: weight for name, weight in saved.items() if name not in tied}
    anew, spare = _unlike(wanted, saved, heads=heads)
    saved = {name: weight for name, weight in saved.items() if name not in spare}
    mistakes = _differences(wanted, saved, {*anew})
    if mistakes:
        raise CheckpointError(
            f"{where}: its weights do not fit this model - give the model that it was trained as\n"
            + "\n".join(f"  {mistake}" for mistake in mistakes)
        )
    load_whole(model, {named[name]: weight for name, weight in saved.items()})
    if anew:
        log.warning("%s: not taken from it, so they start anew: %s", where, ", ".join(anew))
    if spare or unused:
        log.warning("%s: heads that this model has not, unused: %s", where, ", ".join([*spare, *(unused or [])]))
    return anew


def _other_heads(where: Path, model: TransformerConfig, weights: TransformerConfig) -> bool:
    """Whether the heads of a model need not be those of its weights."""
    return huggingface.is_folder(where) or (model.n_labels, model.label_of) != (weights.n_labels, weights.label_of)


def _unlike(wanted: Collection[str], saved: Collection[str], *, heads: bool) -> tuple[list[str], list[str]]:
    """Names of the weights that start anew, and of heads that are left."""
    from_encoder = _is(wanted, "encoder.") and _is(wanted, "decoder.") and not _is(saved, "decoder.")
    may_start_anew = (*(huggingface.HEADS if heads or from_encoder else ()), *(("decoder.",) if from_encoder else ()))
    spare = [name for name in saved if name.startswith(huggingface.HEADS)] if heads or from_encoder else []
    # An encoder's head scores what its transform makes of hidden states: the decoder's is another one.
    spare = spare if from_encoder else [name for name in spare if name not in wanted]
    kept = {*saved} - {*spare}
    anew = [name for name in wanted if name not in kept and name.startswith(may_start_anew or ("\0",))]
    return anew, spare


def _is(weights: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights)


def _differences(wanted: dict[str, Tensor], saved: dict[str, Tensor], excused: set[str]) -> list[str]:
    """One line for each weight that is only on one side or has two shapes."""
    lines = [f"{name}: in the model, not in the checkpoint" for name in wanted if name not in {*saved, *excused}]
    lines += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in {*wanted, *excused}]
    for name, weight in wanted.items():
        if name not in saved or saved[name].shape == weight.shape:
            continue
        line = f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(weight.shape)} in the model"
        if name.endswith("position.table.weight") and saved[name].shape[1:] == weight.shape[1:]:
            line += f" - set model.max_length={len(saved[name])}"
        lines.append(line)
    return lines
