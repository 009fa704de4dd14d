"""The few collectives of a run: sums over processes, one packed message at a time, what all must agree on, and tensors
that are brought to where they are worked on.

Without an initialised process group every function is the identity, so a single process runs the same code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    return dist.get_world_size(_data_group) if _distributed() else 1


def all_sum(values: Tensor) -> Tensor:
    """Sum of `values` over the processes, in place; every process gets the result. No host sync."""
    if n_processes() > 1:
        dist.all_reduce(values, group=_data_group)
    return values


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
    return dist.get_rank() if _distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _distributed() else 1


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to the L2 norm `max_norm` (None: leave them), together; returns their norm before that.
    No host sync.

    Gradients may be spread over processes, and not all of them in the same way: torch's own function stacks the norms
    of all parameters, which is refused across meshes. In a process alone they are plain, on one device, and nothing has
    to be sorted first.
    """
    if not _distributed():
        return _clip_plain([p.grad for p in parameters if p.grad is not None], max_norm)
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if max_norm is not None:
        for group in by_mesh.values():
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _clip_plain(gradients: list[Tensor], max_norm: float | None) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, to the bit."""
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
        return self._values.view(-1).tolist()


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
        columns = [_as_float64(column) for column in zip(*steps, strict=True)]
        device = next((column.device for column in columns if column.device.type != "cpu"), columns[0].device)
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
        first = not _distributed() or dist.get_rank(_data_group) == 0
        self.names, self._waiting = names, []
        self._values = values if first or values is None else torch.zeros_like(values)


def _as_float64(values: Sequence[Summand]) -> Tensor:
    """Doubles: sums of millions of token losses keep all their digits."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).double() if tensors else torch.tensor(values, dtype=torch.float64)


def own_part(tensor: Tensor) -> Tensor:
    """What of `tensor` lies in this process: all of it, unless it is spread over several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    for process, at in zip(mesh.mesh.flatten().tolist(), itertools.product(*map(range, mesh.shape)), strict=True):
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


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
