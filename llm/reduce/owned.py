"""Tensors that lie over the processes, brought whole to one of them and laid out again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm.reduce.collectives import rank, world_size


def own_part(tensor: Tensor) -> Tensor:
    """What of `tensor` lies in this process: all of it, unless it is spread over several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_spread(module: nn.Module) -> bool:
    """Whether some of its parameters lie over several processes, which then have to call it together."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def n_copies(tensor: Tensor) -> int:
    """In how many processes each part of `tensor` lies; a plain one is taken to be the same in all."""
    if not isinstance(tensor, DTensor):
        return world_size()
    axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in axes if placement.is_replicate())


class _Part(NamedTuple):
    """What of a tensor a process holds, and which of the copies of the whole that is a part of."""

    box: tuple[slice, ...]
    shape: tuple[int, ...]
    copy: tuple[int, ...]


class Owned:
    """Tensors that lie over the processes: each is made whole in one of them, its owner, and laid out again.

    Parts go to the owner alone, and what became of the whole goes back to where parts lie. So in the one message each
    way a process sends and receives about what it holds, where a gather would bring it what all hold. What every
    process has whole, as under DDP, is with its owner already, and all gather the results. No host sync.

    Args:
        tensors: plain ones, which are the same in all processes, or DTensors on a mesh of all processes.
        owners: of each tensor the process.
        dtype: in which they travel.

    Attributes:
        given: which tensors, by index, need this process's part for their owner.
        mine: which tensors, by index, this process owns.
    """

    def __init__(self, tensors: Sequence[Tensor], owners: Sequence[int], dtype: torch.dtype) -> None:
        here, everybody, every = rank(), range(world_size()), range(len(tensors))
        known: dict[object, list[_Part]] = {}
        parts = [_parts(tensor, known) for tensor in tensors]  # [tensor][process]
        self.given = [i for i in every if parts[i][here].copy == parts[i][owners[i]].copy]
        self.mine = [i for i in every if owners[i] == here]
        self._dtype, self._device = dtype, tensors[0].device
        self._whole_shapes = [tuple(tensors[i].shape) for i in self.mine]
        # Each message by process: of what is given, which, and of what is owned, which and what of it.
        self._give = [[at for at, i in enumerate(self.given) if owners[i] == k] for k in everybody]
        self._given_shapes = [parts[i][here].shape for i in self.given]
        self._take = [
            [(at, parts[i][k]) for at, i in enumerate(self.mine) if parts[i][k].copy == parts[i][here].copy]
            for k in everybody
        ]
        self._return = [[(at, parts[i][k]) for at, i in enumerate(self.mine)] for k in everybody]
        self._get = [[(i, parts[i][here].shape) for i in every if owners[i] == k] for k in everybody]
        self._whole_everywhere = all(n_copies(tensor) == len(everybody) for tensor in tensors)

    def traffic(self) -> tuple[str, int]:
        """What `collect` and `spread` take: the kind of collective, and bytes, of an all-gather those of the whole, of
        an all-to-all those that leave this process."""
        width = self._dtype.itemsize
        received = [sum(math.prod(shape) for _, shape in group) for group in self._get]
        if self._whole_everywhere:
            return "all_gather", width * len(received) * max(received)
        given = [sum(math.prod(self._given_shapes[at]) for at in group) for group in self._give]
        back = [sum(math.prod(part.shape) for _, part in group) for group in self._return]
        return "all_to_all", width * (sum(given) + sum(back) - given[rank()] - back[rank()])

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's part of each tensor in `given` -> each tensor in `mine`, whole."""
        if self._whole_everywhere:
            return [part.to(self._dtype) for part in parts]
        outgoing = self._packed([parts[at] for group in self._give for at in group])
        sent = [sum(math.prod(self._given_shapes[at]) for at in group) for group in self._give]
        received = [sum(math.prod(part.shape) for _, part in group) for group in self._take]
        pieces = _split(_exchanged(outgoing, sent, received), [p.shape for group in self._take for _, p in group])
        whole = [torch.empty(shape, dtype=self._dtype, device=self._device) for shape in self._whole_shapes]
        _copy([whole[at][part.box] for group in self._take for at, part in group], pieces)
        return whole

    def spread(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor in `mine` -> this process's part of every tensor."""
        received = [sum(math.prod(shape) for _, shape in group) for group in self._get]
        if len(received) == 1:
            return list(whole)
        if self._whole_everywhere:
            room = max(received)  # a collective of equal parts travels in a ring
            outgoing = torch.zeros(room, dtype=self._dtype, device=self._device)
            outgoing[: received[rank()]] = self._packed(whole)
            gathered = torch.empty(len(received) * room, dtype=self._dtype, device=self._device)
            gather = (
                getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            )  # its name before torch 2.13
            gather(gathered, outgoing)
            incoming = torch.cat([part[:n] for part, n in zip(gathered.split(room), received, strict=True)])
        else:
            outgoing = self._packed([whole[at][part.box] for group in self._return for at, part in group])
            sent = [sum(math.prod(part.shape) for _, part in group) for group in self._return]
            incoming = _exchanged(outgoing, sent, received)
        order = [i for group in self._get for i, _ in group]
        pieces = _split(incoming, [shape for group in self._get for _, shape in group])
        return [piece for _, piece in sorted(zip(order, pieces, strict=True), key=lambda pair: pair[0])]

    def _packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """One after the other, as they travel."""
        flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=self._dtype, device=self._device)
        _copy(_split(flat, [tensor.shape for tensor in tensors]), tensors)
        return flat


def _parts(tensor: Tensor, known: dict[object, list[_Part]]) -> list[_Part]:
    """What of `tensor` each process holds; `known` keeps the answers for its like."""
    if not isinstance(tensor, DTensor):
        whole = tuple(slice(0, size) for size in tensor.shape)
        return [_Part(whole, tuple(tensor.shape), (k,)) for k in range(world_size())]
    mesh, placements = tensor.device_mesh, tensor.placements
    key = (mesh, placements, tensor.shape)
    if key in known:
        return known[key]
    by_process: dict[int, _Part] = {}
    for process, at in enumerate(itertools.product(*map(range, mesh.shape))):  # as init_device_mesh lays them out
        box = [range(size) for size in tensor.shape]
        # The last axis first: fully_shard splits what tensor parallelism has made.
        for size, placement, place in reversed(list(zip(mesh.shape, placements, at, strict=True))):
            if not placement.is_replicate():
                side: int = placement.dim  # type: ignore[attr-defined]  # Shard and its kin have no class in common
                step = -(-len(box[side]) // size)  # as torch.chunk: the last parts may be short, or empty
                box[side] = box[side][place * step : (place + 1) * step]
        copy = tuple(place for placement, place in zip(placements, at, strict=True) if placement.is_replicate())
        slices = tuple(slice(span.start, span.stop) for span in box)
        by_process[process] = _Part(slices, tuple(len(span) for span in box), copy)
    known[key] = [by_process[k] for k in range(world_size())]
    assert known[key][rank()].shape == tensor.to_local().shape, f"{placements} of {tensor.shape} is not understood"
    return known[key]


def _exchanged(outgoing: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """`sent[k]` elements go to process k, in turn; `received[k]` come from it."""
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return incoming


def _split(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if to:
        torch._foreach_copy_(list(to), list(tensors))
