"""What processes send each other, read off the collectives that a piece of code calls, whatever carries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One call: `n_bytes` is the whole, as it is before it is scattered, after it was gathered, or reduced in place."""

    kind: str  # all_gather, reduce_scatter, all_reduce or broadcast
    n_bytes: int
    element_size: int
    n_ranks: int

    @property
    def sent(self) -> Fraction:
        """Bytes that a rank sends in a ring, on average, and as many it receives: no algorithm gets by with less."""
        times = 2 if self.kind == "all_reduce" else 1  # a reduce-scatter and an all-gather
        return times * self.n_bytes * Fraction(self.n_ranks - 1, self.n_ranks)


class Wire(TorchDispatchMode):
    """Inside, every collective of this thread is noted in `calls`, those of backwards and of DDP's reducer too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls what it is made of, collectives among them, in this mode again
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name
            assert name in _READ or name in _SILENT, f"{name} is a collective that Wire cannot read"
            if name in _READ:
                self.calls.append(_READ[name](*args))
        return func(*args, **(kwargs or {}))


def _collective(kind: str, whole: Tensor, group: Any, times: int = 1) -> Collective:
    group = _resolve_process_group(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)
    return Collective(kind, whole.nbytes * times, whole.element_size(), group.size())


_READ: dict[str, Callable[..., Collective]] = {
    "c10d::allreduce_": lambda tensors, group, *_: _collective("all_reduce", *tensors, group),
    "c10d::broadcast_": lambda tensors, group, *_: _collective("broadcast", *tensors, group),
    "c10d::_allgather_base_": lambda output, _, group, *__: _collective("all_gather", output, group),
    "c10d::_reduce_scatter_base_": lambda _, whole, group, *__: _collective("reduce_scatter", whole, group),
    "_c10d_functional::all_reduce": lambda whole, _, group: _collective("all_reduce", whole, group),
    "_c10d_functional::all_gather_into_tensor": lambda part, n, group: _collective("all_gather", part, group, n),
    "_c10d_functional::reduce_scatter_tensor": lambda whole, _, __, group: _collective("reduce_scatter", whole, group),
}
_SILENT = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
