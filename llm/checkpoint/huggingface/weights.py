"""Weights under Hugging Face's names <-> under ours, every one accounted for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llm.checkpoint.huggingface.architecture import Architecture, Row, Settings
from llm.checkpoint.store import CheckpointError
from llm.model import Transformer, TransformerConfig
from llm.model.position import SinusoidalPosition

HEADS = ("transform.", "head.", "pooler.", "next_sentence.", "classifier.")  # ours that may start anew
Weights = dict[str, Tensor]


class Translated(NamedTuple):
    """Ours, the names of ours that the folder lacks, and the names of theirs that have no place here."""

    config: TransformerConfig
    state: Weights
    anew: list[str]
    unused: list[str]


def expected(config: TransformerConfig) -> dict[str, torch.Size]:
    """The names and shapes of the weights of a network."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(config).state_dict().items()}


def from_theirs(
    weights: Mapping[str, Tensor], theirs: Settings, architecture: Architecture, config: TransformerConfig, where: str
) -> Translated:
    """All weights under our names.

    Raises:
        CheckpointError: naming each weight of the body that is missing, left over or of another shape, and each copy
            that differs from what it is tied to.
    """
    left = _tidied(weights, architecture)
    config = _told_by_weights(config, architecture, left)
    shapes, state, mistakes = expected(config), {}, []
    mistakes += _without_copies(left, architecture, config)
    mistakes += _without_tables(left, config)
    offset = architecture.offset(theirs)
    for row in architecture.expanded(config):
        for name, parts in _named(row):
            parts = [part for part in parts if part in shapes]
            if not parts or name not in left or (parts == ["head.weight"] and config.tie_embeddings):
                continue
            found = left.pop(name)
            if row.offset:
                found = found[offset:]
            found = found.T if row.transposed and found.dim() == 2 else found
            if row.flat:
                found = found.flatten()
            if len(found) != sum(shapes[part][0] for part in parts):
                mistakes.append(f"{name}: {tuple(found.shape)}, but {', '.join(parts)} is {tuple(shapes[parts[0]])}")
                continue
            for part, piece in zip(parts, found.split([shapes[part][0] for part in parts]), strict=True):
                if piece.shape != shapes[part]:
                    mistakes.append(f"{name}: {tuple(found.shape)}, but {part} is {tuple(shapes[part])}")
                state[part] = piece.contiguous()
    if config.tie_embeddings and "head.weight" in shapes and "embed.weight" in state:
        state["head.weight"] = state["embed.weight"]
    anew = [name for name in shapes if name not in state and name.startswith(HEADS)]
    unused = [name for name in left if name.startswith(architecture.headed)]
    mistakes += [f"{name}: not in the folder" for name in shapes if name not in state and name not in anew]
    mistakes += [f"{name}: left over, no weight here is it" for name in left if name not in unused]
    if mistakes:
        lines = "\n".join(f"  {line}" for line in mistakes)
        raise CheckpointError(f"{where}: its weights are not those of its config.json - mend one of them\n{lines}")
    return Translated(config, state, anew, unused)


def to_theirs(
    state: Mapping[str, Tensor], theirs: Settings, architecture: Architecture, config: TransformerConfig
) -> Weights:
    """All weights under their names; of a tied embedding each once, as transformers writes it.

    Raises:
        CheckpointError: naming each weight that has no name there, or is not there.
    """
    left = dict(state)
    if config.tie_embeddings:
        left.pop("head.weight", None)
    out: Weights = {}
    for row in architecture.expanded(config):
        for name, parts in _named(row):
            if not all(part in left for part in parts):
                continue
            pieces = [left.pop(part) for part in parts]
            whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            whole = whole.T if row.transposed and whole.dim() == 2 else whole
            if row.offset:
                whole = torch.cat((whole.new_zeros(architecture.offset(theirs), whole.shape[1]), whole))
            out[name] = (whole.unsqueeze(0) if row.flat else whole).contiguous()
    if not config.tie_embeddings:  # then transformers ties nothing, what has two names there is read under both
        out |= {copy: out[source].clone() for copy, source in architecture.copies.items() if source in out}
    missing = [name for name in expected(config) if name not in state]
    if left or missing:
        lines = [f"{name}: has no name in {architecture.model_type}" for name in left]
        lines += [f"{name}: not in the checkpoint" for name in missing]
        raise CheckpointError("the weights cannot be exported\n" + "\n".join(f"  {line}" for line in lines))
    return out


def _named(row: Row) -> list[tuple[str, list[str]]]:
    """The tensors of a row: theirs, and the parts of ours."""
    if row.whole:
        return [(row.theirs, list(row.parts))]
    return [(f"{row.theirs}.{kind}", [f"{part}.{kind}" for part in row.parts]) for kind in ("weight", "bias")]


def _tidied(weights: Mapping[str, Tensor], architecture: Architecture) -> Weights:
    """With the prefix that a body saved alone lacks, with names of today, without what was never trained."""
    prefix = architecture.prefix
    bare = not any(name.startswith(prefix) for name in weights)
    tidy = {}
    for name, weight in weights.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        tidy[prefix + name if bare else name] = weight
    return {name: w for name, w in tidy.items() if not any(re.fullmatch(rule, name) for rule in architecture.dropped)}


def _told_by_weights(config: TransformerConfig, architecture: Architecture, left: Weights) -> TransformerConfig:
    """What config.json does not say: which heads there are, and whether T5's is tied."""
    bias = left.get("final_logits_bias")
    if bias is not None:  # a buffer of zeros in all models but those that were trained with one
        if bias.any():
            return dataclasses.replace(config, head_bias=True)
        del left["final_logits_bias"]
    if architecture.model_type == "t5":
        return dataclasses.replace(config, tie_embeddings="lm_head.weight" not in left)
    if architecture.model_type == "bert":
        pooled = left.keys() & {"cls.seq_relationship.weight", "bert.pooler.dense.weight"}
        classifier = left.get("classifier.weight", left.get("qa_outputs.weight"))
        if classifier is not None:
            return dataclasses.replace(config, n_labels=len(classifier), label_of="text" if pooled else "token")
        return dataclasses.replace(config, next_sentence=bool(pooled))
    return config


def _without_copies(left: Weights, architecture: Architecture, config: TransformerConfig) -> list[str]:
    """Remove second copies of tied weights; a line for each that is another tensor."""
    copies = dict(architecture.copies)
    if config.tie_embeddings:
        embed = next(row.theirs for row in architecture.rows if row.ours == "embed") + ".weight"
        head = next(row.theirs for row in architecture.rows if row.ours in ("head", "head.weight"))
        copies[head if head.endswith(".weight") else f"{head}.weight"] = embed
    mistakes = []
    for copy, source in copies.items():
        if copy not in left:
            continue
        if source not in left:
            left[source] = left[copy]
        elif not torch.equal(left[copy], left[source]):
            mistakes.append(f"{copy}: not equal to {source}, to which config.json ties it")
        del left[copy]
    return mistakes


def _without_tables(left: Weights, config: TransformerConfig) -> list[str]:
    """Remove stored sinusoids, which are computed here; a line for each that is not what they must be."""
    if config.position != "sinusoidal":
        return []
    mistakes = []
    for name in [name for name in left if name.endswith("embed_positions.weight")]:
        table = left.pop(name)
        waves = SinusoidalPosition(table.shape[1])(torch.zeros(1, *table.shape), torch.arange(len(table)))[0]
        if not torch.allclose(table.float(), waves, atol=1e-3):
            mistakes.append(f"{name}: not the sines and cosines that it must hold")
    return mistakes
