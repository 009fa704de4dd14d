"""Step directories made of folders of Hugging Face's, and the other way round."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import yaml

from llm.checkpoint import huggingface, store
from llm.checkpoint.distribute import weights_of
from llm.checkpoint.labels import labels_of
from llm.checkpoint.load import PREFIX, stored
from llm.checkpoint.store import unused
from llm.model import Transformer, node_of
from llm.tokenizer import Tokenizer


def import_folder(folder: str | Path, out: str | Path) -> tuple[list[str], list[str]]:
    """Write the weights of a folder of Hugging Face's as a step directory; returns the names of those that start anew,
    and of heads of theirs that have no place here.

    Raises:
        CheckpointError: if `out` exists, or anything in the folder is not understood.
    """
    folder, out = Path(folder), unused(out)
    found = huggingface.read(folder)
    torch.manual_seed(0)  # of heads that the folder lacks
    model = Transformer(found.config)
    model.load_state_dict(found.state, strict=not found.anew)
    tokenizer = huggingface.tokenizer_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        attachments = [Path(scratch) / "config.yaml"]
        attachments[0].write_text(yaml.safe_dump({"model": node_of(found.config)}, sort_keys=False))
        if tokenizer is not None:
            attachments.append(Path(scratch) / "tokenizer")
            tokenizer.save(attachments[1])
        tensors = {f"{PREFIX}{name}": weight for name, weight in weights_of(model).items()}
        store.save(out, tensors, {}, attachments)
    return found.anew, found.unused


def export_folder(path: str | Path, out: str | Path) -> None:
    """Write the network of a run or step directory as a folder that transformers loads; what mup multiplies with is a
    part of the weights there.

    Raises:
        CheckpointError: if `out` exists, or transformers has no architecture for the model.
    """
    step = store.find(path)
    config, state = huggingface.folded(*stored(step))
    tokenizer = Tokenizer.load(step / "tokenizer") if (step / "tokenizer").is_dir() else None
    labels, spans = labels_of(step)
    huggingface.write(config, state, tokenizer, out, labels, spans=spans)
