"""The few collectives of a run: sums over processes, one packed message at a time.

Without an initialised process group every function is the identity, so a single process runs the same code.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def n_processes() -> int:
    """How many processes take part in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all processes, in place; every process gets the result. No host sync."""
    if n_processes() > 1:
        dist.all_reduce(values)
    return values


def all_mean(values: Tensor) -> Tensor:
    """Mean of `values` over all processes, in place. No host sync."""
    return all_sum(values).div_(n_processes())


class Totals:
    """Named running (sum, count) pairs that stay on the device until one packed read.

    Logging a value each step through Lightning costs about 300 us and, on the progress bar, a host sync. Here a step
    adds into one small tensor and `reduce` makes a single collective and a single host copy for all names.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: Tensor | None = None  # [n_names, 2] float64: sum and count of each name

    def add(self, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add `{name: (sum, count)}`, scalars on one device. The names must be the same in every call."""
        update = torch.stack([torch.stack((total, count)) for total, count in _as_float64(parts)])
        if self.values is None:
            self.names, self.values = list(parts), update
            return
        assert self.names == list(parts), f"a step added {list(parts)}, earlier steps {self.names}"
        self.values = self.values.to(update.device).add_(update)

    def reduce(self) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}` over all processes since the last call, then start again from zero. One host sync."""
        if self.values is None:
            return {}
        pairs = all_sum(self.values).tolist()
        self.values = None
        return {name: (total, count) for name, (total, count) in zip(self.names, pairs, strict=True)}

    def peek(self, name: str) -> float:
        """The running sum of `name` over all processes, which goes on. One host sync."""
        if self.values is None:
            return 0.0
        return all_sum(self.values[self.names.index(name), 0].clone()).item()

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs so that a resumed run's next log row equals the uninterrupted run's."""
        return {"names": list(self.names), "values": None if self.values is None else self.values.clone()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue the sums of `state_dict`."""
        names, values = state["names"], state["values"]
        assert isinstance(names, list)
        assert values is None or isinstance(values, Tensor)
        self.names, self.values = names, values


def _as_float64(parts: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Detached doubles: sums of millions of token losses keep all their digits."""
    return [(total.detach().double(), count.detach().double()) for total, count in parts.values()]
