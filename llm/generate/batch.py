"""Inputs of unequal length as one batch."""

import torch
from torch import Tensor

from llm.model.transformer import Source


def padded_source(rows: list[list[int]], pad_id: int, device: torch.device) -> Source:
    """Sources of unequal length, padded at their ends."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    documents = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return Source(tokens, documents)


def left_padded(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of unequal length, padded at their beginnings, and by how much; None: all are as long."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows], device=device)
    padding = torch.tensor([width - len(row) for row in rows], device=device)
    return tokens, padding if padding.any() else None
