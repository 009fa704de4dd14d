"""Sums and messages over processes, one packed tensor at a time.

Without an initialised process group every function is the identity, so a single process runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_data_group: dist.ProcessGroup | None = None


def use(data_group: dist.ProcessGroup | None) -> None:
    """Sum over `data_group` from now on: where several processes share the same data, it must be counted once.

    None is all processes. A strategy says this, for as long as it is in use.
    """
    global _data_group
    _data_group = data_group


def n_processes() -> int:
    """How many processes the sums run over: those that have data of their own."""
    return dist.get_world_size(_data_group) if distributed() else 1


def is_first_of_data() -> bool:
    """Whether this is the first of the processes that the sums run over."""
    return not distributed() or dist.get_rank(_data_group) == 0


def all_sum(values: Tensor) -> Tensor:
    """Sum of `values` over the processes, in place; every process gets the result. No host sync."""
    if n_processes() > 1:
        dist.all_reduce(values, group=_data_group)
    return values


def all_sum_later(values: Tensor) -> Callable[[], Tensor]:
    """`all_sum` that travels while the caller goes on; what is returned gives the sum, once it has arrived."""
    if n_processes() == 1:
        return lambda: values
    work = dist.all_reduce(values, group=_data_group, async_op=True)
    assert work is not None

    def arrived() -> Tensor:
        work.wait()
        return values

    return arrived


def all_gather(values: Tensor) -> Tensor:
    """`values` of the processes with data of their own, in their order: [..] -> [processes, ..]. No host sync."""
    if n_processes() == 1:
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(n_processes())]
    dist.all_gather(parts, values.contiguous(), group=_data_group)
    return torch.stack(parts)


def from_first(values: Tensor) -> Tensor:
    """`values` of the first of all processes, in place: for what must not differ even in the last bit."""
    if world_size() > 1:
        dist.broadcast(values, src=0)
    return values


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as float64 [len(values)] on `device`. No host sync."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def gather_objects(value: T) -> list[T]:
    """Plain data of all processes, in the order of their ranks; every process gets the list."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def rank() -> int:
    """Which of all processes this is."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if distributed() else 1


class AnyRaised:
    """Whether any process has raised its flag; all learn it in the same call.

    The question travels while the caller goes on, and is answered in the next call: nobody waits for the others, and no
    device is waited for. A process alone is answered at once.
    """

    def __init__(self) -> None:
        self._question: tuple[Tensor, dist.Work] | None = None

    def __call__(self, raised: bool) -> bool:
        """Every process calls this equally often. After a True it is to be called no more."""
        if world_size() == 1:
            return raised
        if self._answer():
            return True
        flag = torch.tensor([raised], dtype=torch.int32)  # on the CPU: gloo's
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._question = flag, work
        return False

    def close(self) -> bool:
        """The answer to the last question."""
        return self._answer()

    def _answer(self) -> bool:
        if self._question is None:
            return False
        flag, work = self._question
        self._question = None
        work.wait()
        return bool(flag.item())


def distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()
