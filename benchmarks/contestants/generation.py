"""Greedy continuations, by ours or by transformers' generate.

`python -m benchmarks.contestants.generation SETTINGS.json`. A step is one batch of prompts; what stands for its loss is
the mean of the tokens that it wrote, which are to be the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.plain import load_steps
from benchmarks.turn import Turn

Write = Callable[[dict[str, Tensor]], Tensor]


def ours(settings: dict[str, Any]) -> Write:
    """llm.generate."""
    from llm.generate import generate
    from llm.model import Transformer, TransformerConfig

    model = Transformer(TransformerConfig(**settings["model"]))
    model.load_state_dict(torch.load(Path(settings["weights"]) / "state.pt", weights_only=True))

    def write(batch: dict[str, Tensor]) -> Tensor:
        padding = batch["padding"] if batch["padding"].any() else None
        return generate(model, batch["tokens"], settings["n_new"], temperature=0.0, padding=padding)

    return write


def theirs(settings: dict[str, Any]) -> Write:
    """transformers' generate, which is told not to stop early."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        Path(settings["weights"]) / "theirs", attn_implementation="sdpa"
    ).eval()
    n_new = settings["n_new"]

    def write(batch: dict[str, Tensor]) -> Tensor:
        width = batch["tokens"].shape[1]
        seen = (torch.arange(width) >= batch["padding"].unsqueeze(1)).long()
        length = {"max_new_tokens": n_new, "min_new_tokens": n_new}
        return model.generate(batch["tokens"], attention_mask=seen, do_sample=False, pad_token_id=0, **length)

    return write


def main(settings: dict[str, Any]) -> None:
    """Write and report."""
    steps = [step[0] for step in load_steps(settings["steps"])]
    write = {"ours": ours, "theirs": theirs}[settings["kind"]](settings)
    turn = Turn()
    for number in range(turn.pace.n_steps):
        batch = steps[number % len(steps)]
        new = write(batch)[:, batch["tokens"].shape[1] :]
        assert new.shape[1] == settings["n_new"], f"{new.shape[1]} tokens were written"
        turn.after_step(new.double().mean())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
