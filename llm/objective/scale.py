"""What the sums of a micro-batch are multiplied with, so that those of a whole step come to a mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm.objective.loss import Loss
from llm.reduce import Sum, all_sum_later, n_processes, to_device


class Scale:
    """What the sums of each part are multiplied with: the number of processes over the count of the whole global step.

    Strategies average gradients over processes, so n · sum / count, averaged over n, is the mean over all tokens. A
    part that nothing was predicted for has sum 0 and is divided by 1: its loss is 0, not NaN.

    The counts travel, in one message, while the forward computes: only its backward needs them. No host sync.

    Args:
        counts: of each part, of this process's micro-batches.
        device: of what they are for.
    """

    def __init__(self, counts: list[dict[str, int]], device: torch.device) -> None:
        self._totals = {name: sum([count[name] for count in counts]) for name in counts[0]}
        self._arrived: Callable[[], Tensor] | None = None
        self._scales: dict[str, Tensor | float] = {}
        if n_processes() > 1:
            self._arrived = all_sum_later(to_device(list(self._totals.values()), device))

    def __getitem__(self, name: str) -> Tensor | float:
        """Of several processes a scalar on the device."""
        if not self._scales:
            if self._arrived is None:
                self._scales = {part: 1 / max(1, total) for part, total in self._totals.items()}
            else:
                scales = n_processes() / self._arrived().clamp(min=1)
                self._scales = dict(zip(self._totals, scales.unbind(), strict=True))
        return self._scales[name]


def plus(one: Sum, other: Sum) -> Sum:
    """Sums and counts of two micro-batches together."""
    return one[0] + other[0], one[1] + other[1]


def start(parts: dict[str, Loss], scale: Scale) -> tuple[Tensor, Tensor]:
    """Sums of the parts that are trained, [parts] or a scalar, and the gradient there, with which a backward starts:
    dividing the sums first would take kernels on both ways."""
    pairs = [(part.total, part.weight * scale[name]) for name, part in parts.items() if part.weight]
    starts = [
        start.to(total.dtype) if isinstance(start, Tensor) else torch.full_like(total, start) for total, start in pairs
    ]
    if len(pairs) == 1:
        return pairs[0][0], starts[0]
    return torch.stack([total for total, _ in pairs]), torch.stack(starts)
