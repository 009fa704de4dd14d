"""How much memory tensors take while a step runs on fake ones, which have shapes and no numbers."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.reduce import own_part

_CAST = "_to_copy"
_WIRE = ("c10d", "_c10d_functional", "fsdp")  # operators that gather, scatter and sum
Judge = Callable[[Tensor], str]


class Meter(TorchDispatchMode):
    """Counts the bytes of all that is made inside and still lives, by moment and kind.

    A moment is what `enter` names; of each the worst is remembered, with what there was of every kind. Of which kind a
    tensor is, `judge` says when it is made; what a collective has to do with, and weights in another dtype, are
    "gathered".

    Attributes:
        worst: moment -> kind -> bytes, when the sum over kinds was the largest.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.worst: dict[str, dict[str, float]] = {}
        self._moment = "start"
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._makers: dict[int, str] = {}
        self._casts: dict[int, tuple[int, str]] = {}
        self._numbers: dict[int, int] = {}  # places in memory are used again
        self._count = count()
        self._now: defaultdict[str, int] = defaultdict(int)
        self._total = 0
        self._peak = 0.0

    def enter(self, moment: str) -> None:
        """From here on it is another moment, or one again that has been before."""
        self._moment, self._peak = moment, sum(self.worst[moment].values()) if moment in self.worst else -1.0
        self._look()

    def forget(self) -> None:
        """Begin anew with all moments; what lives goes on being counted."""
        self.worst = {}

    def call(self, kind: str, tensors: list[Tensor]) -> None:
        """Say what kind these are of."""
        for tensor in tensors:
            key = own_part(tensor).untyped_storage()._cdata
            if key in self._sizes and self._kinds[key] != kind:
                self._now[self._kinds[key]] -= self._sizes[key]
                self._kinds[key] = kind
                self._now[kind] += self._sizes[key]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.device.type != "meta":
                self._made(value, function, args)
        if function.namespace in _WIRE:
            self.call("gathered", [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        self._look()
        return result

    def __enter__(self) -> Meter:
        # fully_shard frees gathered weights by shrinking their storage, which is no operator.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*raised)

    def maker(self, tensor: Tensor) -> str:
        """The operator that this, or what it is a view of, is the result of; "" of what was there before."""
        return self._makers.get(tensor.untyped_storage()._cdata, "")

    def cast_of(self, tensor: Tensor) -> tuple[int, str] | None:
        """Of a tensor in another dtype, which one it was made of, by a number, and of what kind that was; else None."""
        return self._casts.get(tensor.untyped_storage()._cdata)

    def _made(self, tensor: Tensor, function: Any, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._makers[key] = function.__name__.partition(".")[0]
            self._sizes[key], self._kinds[key] = 0, self.judge(tensor)
            self._numbers[key] = next(self._count)
            source = own_part(args[0]).untyped_storage()._cdata if self._makers[key] == _CAST else None
            if source in self._kinds:
                self._casts[key] = self._numbers[source], self._kinds[source]
                if self._kinds[source] in ("parameters", "gathered"):
                    self._kinds[key] = "gathered"
            weakref.finalize(storage, self._gone, key)
            self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            self._add(key, storage.nbytes() - self._sizes[key])
            self._look()

    def _gone(self, key: int) -> None:
        self._add(key, -self._sizes[key])
        del self._sizes[key], self._kinds[key], self._makers[key], self._numbers[key]
        self._casts.pop(key, None)

    def _add(self, key: int, n_bytes: int) -> None:
        self._sizes[key] += n_bytes
        self._now[self._kinds[key]] += n_bytes
        self._total += n_bytes

    def _look(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            self.worst[self._moment] = dict(self._now)
