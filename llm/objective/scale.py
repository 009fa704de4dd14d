"""What the sums of a micro-batch are multiplied with, so that those of a whole step come to a mean."""

from __future__ import annotations

import torch
from torch import Tensor

from llm.objective.loss import Loss
from llm.reduce import Sum, all_sum, n_processes, to_device


def global_scale(counts: list[dict[str, int]], device: torch.device) -> dict[str, Tensor | float]:
    """Name -> what its sums are multiplied with: the number of processes over the count of the whole global step, from
    the counts of this process's micro-batches; of several processes scalars on `device`. No host sync.

    Strategies average gradients over processes, so n · sum / count, averaged over n, is the mean over all tokens. A
    part that nothing was predicted for has sum 0 and is divided by 1: its loss is 0, not NaN.
    """
    totals = {name: sum([count[name] for count in counts]) for name in counts[0]}
    n = n_processes()
    if n == 1:
        return {name: 1 / max(1, total) for name, total in totals.items()}
    scale = n / all_sum(to_device(list(totals.values()), device)).clamp(min=1)  # one message
    return dict(zip(totals, scale.unbind(), strict=True))


def plus(one: Sum, other: Sum) -> Sum:
    """Sums and counts of two micro-batches together."""
    return one[0] + other[0], one[1] + other[1]


def start(parts: dict[str, Loss], scale: dict[str, Tensor | float]) -> tuple[Tensor, Tensor]:
    """Sums of the parts that are trained, [parts] or a scalar, and the gradient there, with which a backward starts:
    dividing the sums first would take kernels on both ways."""
    pairs = [(part.total, part.weight * scale[name]) for name, part in parts.items() if part.weight]
    starts = [
        start.to(total.dtype) if isinstance(start, Tensor) else torch.full_like(total, start) for total, start in pairs
    ]
    if len(pairs) == 1:
        return pairs[0][0], starts[0]
    return torch.stack([total for total, _ in pairs]), torch.stack(starts)
