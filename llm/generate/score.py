"""How likely a model finds given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm.generate.decode import undisturbed
from llm.model.transformer import Transformer


class Likelihood(NamedTuple):
    """Of a continuation behind its context.

    nats       -log p of all its tokens
    n_tokens   how many they are
    greedy     whether each was the likeliest token
    """

    nats: float
    n_tokens: int
    greedy: bool


def likelihoods(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int = 32
) -> list[Likelihood]:
    """Of each continuation behind its context, tokens both, by a decoder. Pairs of like length share a batch; of a
    context that leaves no room the beginning is not read.

    Raises ValueError for a continuation that is empty, or as long as the model's context.
    """
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if any(not len(continuation) for _, continuation in pairs) or longest >= model.config.max_length:
        raise ValueError(
            f"a continuation of {longest} tokens, or of none: must be of 1 to {model.config.max_length - 1} tokens"
        )
    rows = [[*context, *continuation][-model.config.max_length :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[Likelihood] = [Likelihood(0.0, 0, False)] * len(rows)
    device = model.embed.weight.device
    with undisturbed(model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            width = max(len(rows[index]) for index in batch)
            # Padding comes behind, where a decoder's earlier tokens do not see it.
            tokens = torch.tensor([[*rows[i], *[pad_id] * (width - len(rows[i]))] for i in batch], device=device)
            table = model.logits(model(tokens[:, :-1])).float().log_softmax(-1)  # [B, T - 1, V]
            told = table.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            best = table.argmax(-1) == tokens[:, 1:]
            for row, index in enumerate(batch):
                end, n = len(rows[index]) - 1, len(pairs[index][1])
                part = slice(end - n, end)
                found[index] = Likelihood(-float(told[row, part].sum()), n, bool(best[row, part].all()))
    return found
