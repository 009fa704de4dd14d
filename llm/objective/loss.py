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
    number as soon as the counts differ.
    """

    total: Tensor  # scalar, the sum over what was predicted
    count: Tensor  # scalar, how much was predicted
    weight: float = 1.0


def n_labels(labels: Tensor) -> Tensor:
    """How many positions of `labels` are predicted (scalar, on the device)."""
    return (labels != IGNORED).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Negative log-likelihood in nats, summed over the predicted positions.

    Args:
        logits: [B, T, V], any float type; the softmax is taken in float32.
        labels: [B, T], IGNORED where nothing is predicted.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, n_labels(labels))
