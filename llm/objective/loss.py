"""What a loss is here: a sum and the count that will divide it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a position that is not predicted; torch's own default ignore_index


@dataclass(frozen=True)
class Loss:
    """One named part of the loss over a micro-batch.

    It is divided by its count over the *whole* global step, not over this micro-batch: the mean of means is another
    number as soon as the counts differ. A part of weight 0 is measured and not trained.
    """

    total: Tensor  # scalar, the sum over what was predicted
    count: Tensor  # scalar, how much was predicted
    weight: float = 1.0
    rows: tuple[Tensor, Tensor] | None = None  # sum and count of each row of the micro-batch, [B] both


def n_labels(labels: Tensor) -> Tensor:
    """How many positions of `labels` are predicted (scalar, on the device)."""
    return (labels != IGNORED).sum()


def token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of each position, by a softmax in float32: [N, V], [N] -> [N], 0 where nothing is predicted."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


def summed(nats: Tensor, labels: Tensor, count: Tensor, *, by_row: bool = True) -> Loss:
    """The loss of whole rows.

    Args:
        nats: [B * T], of each position.
        labels: [B, T], IGNORED where nothing is predicted.
        count: scalar, how many of them are predicted.
        by_row: give the sums of each row, too.
    """
    if not by_row:
        return Loss(nats.sum(), count)
    totals = nats.view_as(labels).sum(1)
    return Loss(totals.sum(), count, rows=(totals.detach(), (labels != IGNORED).sum(1)))


def gathered(nats: Tensor, labels: Tensor, rows: Tensor, n_rows: int, count: Tensor, *, by_row: bool = True) -> Loss:
    """The loss of positions picked out of a micro-batch.

    Args:
        nats: [N], of each position.
        labels: [N], IGNORED where nothing is predicted.
        rows: int64 [N], the row of the micro-batch that each position is in.
        n_rows: how many rows the micro-batch has.
        count: scalar, how many positions are predicted.
        by_row: give the sums of each row, too.
    """
    if not by_row:
        return Loss(nats.sum(), count)
    totals = nats.new_zeros(n_rows).index_add(0, rows, nats.detach())
    counts = labels.new_zeros(n_rows).index_add(0, rows, (labels != IGNORED).to(labels.dtype))
    return Loss(nats.sum(), count, rows=(totals, counts))
