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


def cross_entropy(logits: Tensor, labels: Tensor, *, by_row: bool = True) -> Loss:
    """Negative log-likelihood in nats, summed over the predicted positions.

    Args:
        logits: [B, T, V], any float type; the softmax is taken in float32.
        labels: [B, T], IGNORED where nothing is predicted.
        by_row: give the sums of each row, too.
    """
    if not by_row:
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return Loss(total, n_labels(labels))
    nats = _nats(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    totals, counts = nats.sum(1), (labels != IGNORED).sum(1)
    return Loss(totals.sum(), counts.sum(), rows=(totals.detach(), counts))


def gathered_cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Loss:
    """As `cross_entropy`, of positions picked out of a micro-batch.

    Args:
        logits: [N, V].
        labels: [N], IGNORED where nothing is predicted.
        rows: int64 [N], the row of the micro-batch that each position is in.
        n_rows: how many rows the micro-batch has.
    """
    nats = _nats(logits, labels)
    predicted = labels != IGNORED
    totals = nats.new_zeros(n_rows).index_add(0, rows, nats.detach())
    counts = predicted.new_zeros(n_rows, dtype=labels.dtype).index_add(0, rows, predicted.to(labels.dtype))
    return Loss(nats.sum(), predicted.sum(), rows=(totals, counts))


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, V], [N] -> [N], 0 where nothing is predicted."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
