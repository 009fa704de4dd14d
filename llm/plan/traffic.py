"""One optimizer step of one process as a list of stages: what each computes, and what travels before, in and after it.

The stages follow what `llm/strategy` does, and tests/cluster/test_scaling.py counts the bytes of both: they are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Axis = Literal["replicate", "shard", "tensor"]
Shape = tuple[int, ...]

_GRADIENT_BYTES = 4  # gradients are summed in float32, whatever the precision
_BUCKET_BYTES = 25 * 2**20  # DDP sends gradients when so many have come (torch's default)
_BLOCK = re.compile(r"(.*\.?blocks\.\d+)\.")
_COLUMNS = ("query", "key", "value", "gate", "up", "embed", "head")  # tensor parallelism splits their outputs
_ROWS = ("out", "down")  # and of these the inputs, so their outputs are summed


@dataclass(frozen=True)
class Model:
    """What the wire sees of a network.

    Args:
        shapes: name of a parameter -> shape, in the model's order, a tied one once.
        flops_per_token: forward and backward, `Transformer.flops_per_token`.
    """

    shapes: Mapping[str, Shape]
    flops_per_token: float

    @property
    def vocab_size(self) -> int:
        return self.shapes["embed.weight"][0]

    @property
    def dim(self) -> int:
        return self.shapes["embed.weight"][1]

    @cached_property
    def n_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def blocks(self) -> list[dict[str, Shape]]:
        """The parameters of each block, in the order of the forward."""
        found: dict[str, dict[str, Shape]] = {}
        for name, shape in self.shapes.items():
            if match := _BLOCK.match(name):
                found.setdefault(match[1], {})[name] = shape
        return list(found.values())

    @cached_property
    def around(self) -> dict[str, Shape]:
        """What is no block's: embeddings, the last norm, the head."""
        return {name: shape for name, shape in self.shapes.items() if not _BLOCK.match(name)}


@dataclass(frozen=True)
class Layout:
    """How a strategy lays the processes out, as a mesh [replicate, shard, tensor], the last of them neighbours.

    Args:
        strategy: ddp replicates the model, fsdp shards it.
        world_size: processes, one per device.
        replicate_size: groups of processes that each hold all shards (fsdp).
        tensor_size: processes that share each matrix product and the same data (fsdp).
        reshard_after_forward: blocks are gathered again for their backward (fsdp).
        n_micro_batches: forwards and backwards a step; gradients travel in the last.
        micro_batch_tokens: tokens of each, on one process; of an encoder-decoder those of its decoder.
        weight_bytes: of an element that is gathered, and of an activation: 4, or 2 in bf16-true.
        source_tokens: those of an encoder-decoder's encoder.
        scored_tokens: those whose scores over the vocabulary are computed; None: all, of an encoder-decoder the
            decoder's.
        mixed: what products give is of 2 bytes where weights are of 4 (bf16-mixed).
    """

    strategy: Literal["single", "ddp", "fsdp"]
    world_size: int
    replicate_size: int = 1
    tensor_size: int = 1
    reshard_after_forward: bool = True
    n_micro_batches: int = 1
    micro_batch_tokens: int = 0
    weight_bytes: int = 2
    source_tokens: int = 0
    scored_tokens: int | None = None
    mixed: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a mesh that the processes do not fill."""
        if self.strategy == "single" and self.world_size != 1:
            raise ValueError(f"world_size = {self.world_size}: strategy single drives one device; set it to 1")
        unit = self.replicate_size * self.tensor_size
        if self.strategy != "fsdp" and unit != 1:
            raise ValueError(f"replicate_size, tensor_size: there are none in {self.strategy}; leave them 1")
        if self.world_size % unit:
            raise ValueError(
                f"replicate_size x tensor_size = {unit}: must divide world_size = {self.world_size}; change one of them"
            )

    @property
    def n_data(self) -> int:
        """Processes with data of their own."""
        return self.world_size // self.tensor_size

    @property
    def n_shards(self) -> int:
        """Processes that share one copy of what a tensor rank holds."""
        return self.n_data // self.replicate_size if self.strategy == "fsdp" else 1

    @property
    def tokens(self) -> int:
        """Of one step, over all processes."""
        return self.n_data * self.n_micro_batches * (self.micro_batch_tokens + self.source_tokens)

    @property
    def scored(self) -> int:
        """Tokens of a micro-batch whose scores are computed."""
        return self.micro_batch_tokens if self.scored_tokens is None else self.scored_tokens

    def group(self, axis: Axis) -> tuple[int, int]:
        """How many processes talk along an axis, and how far apart neighbours among them are."""
        if axis == "tensor":
            return self.tensor_size, 1
        if axis == "shard":
            return self.n_shards, self.tensor_size
        return self.n_data // self.n_shards, self.tensor_size * self.n_shards


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind along one axis of the mesh.

    n_bytes counts the whole tensor that is gathered, scattered or reduced; n_calls say in how many pieces.
    """

    kind: Kind
    n_bytes: int
    axis: Axis
    n_calls: int = 1


@dataclass(frozen=True)
class Stage:
    """Something computed without a pause, and what travels for it.

    share: of the FLOPs of one micro-batch. before: must have come, and is asked for one stage ahead. during: waited
    for in the middle. after: sent when it is done, and waited for at the end of the step.
    """

    share: float
    before: tuple[Transfer, ...] = ()
    during: tuple[Transfer, ...] = ()
    after: tuple[Transfer, ...] = ()


def stages(model: Model, layout: Layout, recompute: bool = False) -> Iterator[Stage]:
    """One step. A forward is a third of the FLOPs, with recomputation (checkpointing=full) a quarter.

    Of a model's FLOPs the head has 6 · dim · vocabulary a scored token, and the blocks the rest, by their parameters
    and the tokens that these meet.
    """
    forward = 1 / 4 if recompute else 1 / 3
    flops = model.flops_per_token * (layout.micro_batch_tokens + layout.source_tokens)
    head = 6 * model.dim * model.vocab_size * layout.scored / flops if flops else 0.0
    blocks, around = model.blocks, _gather(layout, model.around)
    work = [sum(map(math.prod, block.values())) * _tokens(layout, block) for block in blocks]
    shares = [(1 - head) * amount / (sum(work) or 1) for amount in work]
    gathers = [_gather(layout, block) for block in blocks]
    again = gathers if layout.reshard_after_forward else [()] * len(blocks)
    embedded = (*_summed(model, layout, layout.micro_batch_tokens), *_summed(model, layout, layout.source_tokens))
    for number in range(1, layout.n_micro_batches + 1):
        last = number == layout.n_micro_batches
        sent = list(_sent(model, layout)) if last else [()] * (len(blocks) + 1)
        yield Stage(0, before=around, during=embedded)
        for share, gather, block in zip(shares, gathers, blocks, strict=True):
            yield Stage(forward * share, before=gather, during=_forward_sums(model, layout, block))
        yield Stage(head, during=(*_logits(model, layout), *_summed(model, layout, layout.scored)))
        for n, after in zip(reversed(range(len(blocks))), sent[:-1], strict=True):
            during = (*_backward_sums(model, layout, blocks[n]), *(_norm_gradients(layout, blocks[n]) if last else ()))
            yield Stage((1 - forward) * shares[n], before=again[n], during=during, after=after)
        yield Stage(0, after=sent[-1])


def bytes_by_kind(step: Iterable[Stage]) -> Counter[Kind]:
    """Of all that travels in a step; of the whole tensors, as a process sees them."""
    counted: Counter[Kind] = Counter()
    for stage in step:
        for transfer in (*stage.before, *stage.during, *stage.after):
            counted[transfer.kind] += transfer.n_bytes
    return counted


def held(layout: Layout, shapes: Mapping[str, Shape]) -> int:
    """Elements that one tensor rank has of these parameters, the first axis padded to a multiple of the shards."""
    local = (_local(name, shape, layout.tensor_size) for name, shape in shapes.items())
    return sum(_padded(shape[0], layout.n_shards) * math.prod(shape[1:]) for shape in local)


def _padded(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def _local(name: str, shape: Shape, tensor_size: int) -> Shape:
    """The part of a parameter that a tensor rank holds: llm/strategy/tensor_parallel.py in one table."""
    module, _, kind = name.rpartition(".")
    if module.endswith("relative.table"):  # a column is a head
        return (shape[0], math.ceil(shape[1] / tensor_size))
    module = module.rpartition(".")[2]
    if module in _COLUMNS:
        return (math.ceil(shape[0] / tensor_size), *shape[1:])
    if module in _ROWS and kind == "weight":
        return (shape[0], math.ceil(shape[1] / tensor_size))
    return shape


def _gather(layout: Layout, shapes: Mapping[str, Shape]) -> tuple[Transfer, ...]:
    if layout.n_shards == 1:
        return ()
    return (Transfer("all_gather", layout.weight_bytes * held(layout, shapes), "shard"),)


def _sent(model: Model, layout: Layout) -> Iterator[tuple[Transfer, ...]]:
    """Gradients behind the backward of each block, the last one first, and behind what is around them.

    FSDP scatters the sums of each group and then all-reduces the scattered parts between replicas. DDP waits until a
    bucket is full, and sends what is left in the end. Here its buckets end with a block.
    """
    n_replicas, _ = layout.group("replicate")
    waiting = 0
    for number, shapes in enumerate([*reversed(model.blocks), model.around]):
        n_bytes = _GRADIENT_BYTES * held(layout, shapes)
        scattered = (Transfer("reduce_scatter", n_bytes, "shard"),) if layout.n_shards > 1 else ()
        waiting += n_bytes // layout.n_shards
        due = layout.strategy == "fsdp" or waiting >= _BUCKET_BYTES or number == len(model.blocks)
        if n_replicas > 1 and due:
            n_calls = 1 if layout.strategy == "fsdp" else math.ceil(waiting / _BUCKET_BYTES)
            yield (*scattered, Transfer("all_reduce", waiting, "replicate", n_calls))
            waiting = 0
        else:
            yield scattered


def _tokens(layout: Layout, block: Iterable[str]) -> int:
    """That a block sees."""
    return layout.source_tokens if layout.source_tokens and _side(block) == "encoder" else layout.micro_batch_tokens


def _side(block: Iterable[str]) -> str:
    return next(iter(block)).partition(".")[0]


def _summed(model: Model, layout: Layout, n_tokens: int, *, product: bool = False) -> tuple[Transfer, ...]:
    """A sum over the tensor axis of an activation [tokens, dim], or of its gradient, which is waited for; in 16 bits
    if a `product` has made it."""
    if layout.tensor_size == 1 or n_tokens == 0:
        return ()
    width = 2 if product and layout.mixed else layout.weight_bytes
    return (Transfer("all_reduce", width * n_tokens * model.dim, "tensor"),)


def _forward_sums(model: Model, layout: Layout, block: Mapping[str, Shape]) -> tuple[Transfer, ...]:
    """One sum behind each product whose inputs are split."""
    return _n_split(block) * _summed(model, layout, _tokens(layout, block), product=True)


def _backward_sums(model: Model, layout: Layout, block: Mapping[str, Shape]) -> tuple[Transfer, ...]:
    """One sum of the gradient before each layer whose products' outputs are split; of the memory that a decoder's block
    looks at, too."""
    looks = any(".cross_attention." in name for name in block)
    memory = _summed(model, layout, layout.source_tokens) if looks else ()
    return (*_n_split(block) * _summed(model, layout, _tokens(layout, block)), *memory)


def _n_split(block: Iterable[str]) -> int:
    return sum(name.endswith(("out.weight", "down.weight")) for name in block)


def _logits(model: Model, layout: Layout) -> tuple[Transfer, ...]:
    if layout.tensor_size == 1 or layout.scored == 0:
        return ()
    n_bytes = (2 if layout.mixed else layout.weight_bytes) * layout.scored
    return (Transfer("all_gather", n_bytes * _padded(model.vocab_size, layout.tensor_size), "tensor"),)


def _norm_gradients(layout: Layout, block: Mapping[str, Shape]) -> tuple[Transfer, ...]:
    """Norms of queries and keys have seen other heads on each rank, so their gradients are summed,
    once a step."""
    sizes = [math.prod(shape) for name, shape in block.items() if ".query_norm." in name or ".key_norm." in name]
    if layout.tensor_size == 1 or not sizes:
        return ()
    width = layout.weight_bytes if layout.n_micro_batches == 1 else _GRADIENT_BYTES  # what has been added up is float32
    return (Transfer("all_reduce", width * sum(sizes), "tensor", len(sizes)),)
