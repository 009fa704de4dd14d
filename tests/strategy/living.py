"""How much memory tensors take, counted by the storages that live: of any device, to the byte."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Bytes of what is made inside: `peak`, the most at any time; `n_bytes()`, of what is still there; meta tensors
    take none."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.n_bytes())
        return result

    def n_bytes(self, without: tuple[Tensor, ...] = ()) -> int:
        """Of all that lives but the storages of `without`."""
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        others = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for key, (_, size) in self._storages.items() if key not in others)
