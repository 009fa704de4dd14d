"""Sums that wait on the device, and numbers on their way from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llm.reduce.collectives import all_sum, is_first_of_data


class Reading:
    """Numbers on their way from the device to the host; nobody waits until they are asked for."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values.detach()
        if values.is_cuda:  # into memory that is not pinned, the host would have to wait for the copy
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers, of a scalar one."""
        if self._event is not None:
            self._event.synchronize()
        values = self._values
        return values.tolist() if values.ndim else [values.tolist()]  # type: ignore[list-item]


Summand = Tensor | float
Sum = tuple[Tensor, Summand]  # a sum, and of how many


class Totals:
    """Named running (sum, count) pairs that stay on the device until one packed read.

    Logging a value each step through Lightning costs about 300 us and, on the progress bar, a host sync. Here a step
    puts its scalars into a list; they are added up, one step after the other, when somebody wants to know, and `reduce`
    makes a single collective and a single host copy for all names.
    """

    _ROOM = 128  # steps: so many scalars may wait on a device

    def __init__(self) -> None:
        self.names: list[str] = []
        self._values: Tensor | None = None  # [n_names, 2] float64: sum and count of each name
        self._waiting: list[list[Summand]] = []  # of each step: sum and count of each name, in turn

    def add(self, parts: Mapping[str, tuple[Summand, Summand]]) -> None:
        """Add `{name: (sum, count)}`, scalars on one device. The names must be the same in every call."""
        if not self.names:
            self.names = list(parts)
        assert self.names == list(parts), f"a step added {list(parts)}, earlier steps {self.names}"
        self._waiting.append([x.detach() if isinstance(x, Tensor) else x for pair in parts.values() for x in pair])
        if len(self._waiting) >= self._ROOM:
            self._add_up()

    def _add_up(self) -> None:
        """In order, so that the sum does not depend on when it was looked at."""
        steps, self._waiting = self._waiting, []
        if not steps:
            return
        if all(x.device.type == "cpu" for x in steps[0] if isinstance(x, Tensor)):
            self._values = _added_on_host(self._values, steps)
            return
        columns = [_as_float64(column) for column in zip(*steps, strict=True)]
        device = next(column.device for column in columns if column.device.type != "cpu")
        updates = torch.stack([column.to(device) for column in columns], dim=1).view(len(steps), -1, 2)
        values = torch.zeros_like(updates[0]) if self._values is None else self._values.to(device)
        for update in updates:
            values += update
        self._values = values

    def reduce(self) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}` over all processes since the last call, then start again from zero. One host sync."""
        self._add_up()
        if self._values is None:
            return {}
        pairs = all_sum(self._values).tolist()
        names, self.names, self._values = self.names, [], None
        return {name: (total, count) for name, (total, count) in zip(names, pairs, strict=True)}

    def peek(self, name: str) -> float:
        """The running sum of `name` over all processes, which goes on. One host sync."""
        self._add_up()
        if self._values is None:
            return 0.0
        return all_sum(self._values[self.names.index(name), 0].clone()).item()

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs so that a resumed run's next log row equals the uninterrupted run's.

        The sums over all processes, each of which calls this, whichever of them writes the checkpoint.
        """
        self._add_up()
        return {"names": list(self.names), "values": None if self._values is None else all_sum(self._values.clone())}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue the sums of `state_dict`: in one process, as they will be added up again."""
        names, values = state["names"], state["values"]
        assert isinstance(names, list)
        assert values is None or isinstance(values, Tensor)
        first = is_first_of_data()
        self.names, self._waiting = names, []
        self._values = values if first or values is None else torch.zeros_like(values)


def _added_on_host(values: Tensor | None, steps: Sequence[Sequence[Summand]]) -> Tensor:
    """As on a device, one step after the other: [n_names, 2]."""
    updates = np.array([[x.tolist() if isinstance(x, Tensor) else x for x in step] for step in steps], np.float64)
    first = np.zeros_like(updates[:1]) if values is None else values.numpy().reshape(1, -1)
    total = np.add.accumulate(np.concatenate((first, updates)), axis=0)[-1]
    return torch.from_numpy(total.reshape(-1, 2).copy())


def _as_float64(values: Sequence[Summand]) -> Tensor:
    """Doubles: sums of millions of token losses keep all their digits."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).double() if tensors else torch.tensor(values, dtype=torch.float64)
