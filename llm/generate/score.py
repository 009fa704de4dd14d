"""How likely a model finds given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.generate.decode import undisturbed
from llm.model.transformer import Transformer

_AT_ONCE = 2048  # positions whose scores are in memory at the same time


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
            ends = torch.tensor([[len(rows[i]) - len(pairs[i][1]), len(rows[i])] for i in batch], device=device)
            places = torch.arange(1, width, device=device)
            asked = (places >= ends[:, :1]) & (places < ends[:, 1:])  # [B, T - 1]
            nats, best = _judged(model, model(tokens[:, :-1])[asked], tokens[:, 1:][asked])
            lengths = asked.sum(1).tolist()
            parts = zip(batch, nats.split(lengths), best.split(lengths), strict=True)
            for index, of_tokens, likeliest in parts:
                found[index] = Likelihood(float(of_tokens.sum()), len(of_tokens), bool(likeliest.all()))
    return found


def _judged(model: Transformer, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each label, and whether it is the likeliest: hidden [N, D], labels [N] -> [N] both. Scores over the
    vocabulary are made in parts: of a batch they would be gigabytes."""
    nats, best = [], []
    for part, wanted in zip(hidden.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        logits = model.logits(part).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        best.append(logits.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(best)
