"""Weights from a checkpoint into a network."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import Tensor, nn

from llm.checkpoint.distribute import load_whole
from llm.checkpoint.store import CheckpointError, find, read
from llm.model import Transformer, TransformerConfig
from llm.tokenizer import Tokenizer

PREFIX = "model."  # the network's attribute in the LightningModule whose state was saved


def load(path: str | Path) -> tuple[Transformer, Tokenizer]:
    """The network, in eval mode on the CPU, and the tokenizer of a run or step directory.

    Raises:
        CheckpointError: if there is no checkpoint, or it does not fit its own configuration.
    """
    step = find(path)
    node = yaml.safe_load((step / "config.yaml").read_text())["model"]
    node.pop("_target_")
    model = Transformer(TransformerConfig(**node))
    load_into(model, step)
    return model.eval(), Tokenizer.load(step / "tokenizer")


def load_into(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a run or step directory into `model`, all of them and nothing else.

    Raises:
        CheckpointError: naming every weight that is missing, left over, or of another shape.
    """
    step = find(path)
    saved = {
        name.removeprefix(PREFIX): weight
        for name, weight in read(step)["state_dict"].items()
        if name.startswith(PREFIX)
    }
    mistakes = _differences(model.state_dict(), saved)
    if mistakes:
        raise CheckpointError(
            f"{step}: its weights do not fit this model - give the model that it was trained as\n"
            + "\n".join(f"  {mistake}" for mistake in mistakes)
        )
    load_whole(model, saved)


def _differences(wanted: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    """One line for each weight that is only on one side or has two shapes."""
    lines = [f"{name}: in the model, not in the checkpoint" for name in wanted if name not in saved]
    lines += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in wanted]
    lines += [
        f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(weight.shape)} in the model"
        for name, weight in wanted.items()
        if name in saved and saved[name].shape != weight.shape
    ]
    return lines
