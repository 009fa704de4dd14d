"""What a loss is here: a sum and the count that will divide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a position that is not predicted; torch's own default ignore_index
Reduction = Literal["none", "sum"]


@dataclass(frozen=True)
class Loss:
    """One named part of the loss over a micro-batch: the sum over what was predicted.

    It is divided by how much was predicted in the *whole* global step, not in this micro-batch: the mean of means is
    another number as soon as the counts differ. A part of weight 0 is measured and not trained.
    """

    total: Tensor  # scalar
    weight: float = 1.0
    rows: tuple[Tensor, Tensor] | None = None  # sum and count of each row of the micro-batch, [B] both


def n_labels(labels: Tensor) -> int:
    """How many positions of `labels`, which are on the host, are predicted."""
    return int(np.count_nonzero(labels.numpy() != IGNORED))


def token_nats(logits: Tensor, labels: Tensor, reduction: Reduction = "none", smoothing: float = 0.0) -> Tensor:
    """-log p(label) by a softmax in float32: [N, V], [N] -> [N], 0 where nothing is predicted, or their sum.

    With `smoothing` that share of the label is spread over the whole vocabulary (Szegedy et al. 2016, section 7).
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction=reduction, label_smoothing=smoothing)


def of_rows(nats: Tensor, labels: Tensor) -> Loss:
    """The loss of whole rows.

    Args:
        nats: [B * T], of each position.
        labels: [B, T], IGNORED where nothing is predicted.
    """
    totals = nats.view_as(labels).sum(1)
    return Loss(totals.sum(), rows=(totals.detach(), (labels != IGNORED).sum(1)))


def gathered(nats: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Loss:
    """The loss of positions picked out of a micro-batch.

    Args:
        nats: [N], of each position.
        labels: [N], IGNORED where nothing is predicted.
        rows: int64 [N], the row of the micro-batch that each position is in.
        n_rows: how many rows the micro-batch has.
    """
    totals = nats.new_zeros(n_rows).index_add(0, rows, nats.detach())
    counts = labels.new_zeros(n_rows).index_add(0, rows, (labels != IGNORED).to(labels.dtype))
    return Loss(nats.sum(), rows=(totals, counts))
