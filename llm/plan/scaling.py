"""Seconds of one optimizer step on a cluster, from bytes, links and the compute of one device. docs/scaling.md says
what of it is measured, assumed and fitted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from llm.plan.traffic import Axis, Layout, Model, Stage, Transfer, held, stages

_UPDATE_BYTES = 28  # AdamW reads weight, gradient and two moments in float32, and writes all but the gradient


@dataclass(frozen=True)
class Link:
    """Bytes per second in one direction, and seconds for a first byte to the neighbour."""

    bytes_per_s: float
    latency_s: float


class Network(Protocol):
    """How long a collective takes, and what it takes from the computation beside it."""

    @property
    def interference(self) -> float:
        """Seconds of compute lost for each second of communication behind it: 0 if another unit does it, 1 if the same
        core."""

    def seconds(self, transfer: Transfer, size: int, stride: int) -> float:
        """Of all calls of a transfer among `size` processes, `stride` apart."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of `node_size` devices, each device with a network card of its own.

    A ring passes through all devices of a node before it leaves it, and NCCL lays one ring for each card, so the cards
    of a node add up: its bandwidth is the smaller of a device's inside and of all the cards that the group has in a
    node. A ring of n makes n - 1 hops, and 2(n - 1) for an all-reduce, in which each process sends (n - 1)/n, and
    2(n - 1)/n, of the bytes (Patarasuk and Yuan 2009). A double binary tree sends all bytes twice in 2 log2 hops
    (Sanders et al. 2009); NCCL has it for all-reduces only, and takes what is faster (src/graph/tuning.cc).

    Args:
        inside: from a device to the next in its node.
        between: through one network card.
        launch_s: of any collective.
        interference: see `Network`. Fitted.
        memory_bytes: of one device.
        memory_bytes_per_s: of one device, for the optimizer's update.
    """

    inside: Link
    between: Link
    node_size: int = 8
    launch_s: float = 8.4e-6  # NCCL's own figure for a ring
    interference: float = 0.0
    memory_bytes: float = 80e9
    memory_bytes_per_s: float = 3.35e12

    def seconds(self, transfer: Transfer, size: int, stride: int) -> float:
        """Of all calls of a transfer among `size` processes, `stride` apart."""
        if size == 1:
            return 0.0
        per_node = min(size, max(1, self.node_size // stride))
        n_nodes = math.ceil(size / per_node)
        bandwidth = self.inside.bytes_per_s
        if n_nodes > 1:
            bandwidth = self.between.bytes_per_s * per_node
            bandwidth = min(self.inside.bytes_per_s, bandwidth) if per_node > 1 else bandwidth
        ring_s = (size - n_nodes) * self.inside.latency_s + (n_nodes - 1) * self.between.latency_s
        share = (size - 1) / size
        one_way = transfer.n_calls * (self.launch_s + ring_s) + share * transfer.n_bytes / bandwidth
        if transfer.kind != "all_reduce":
            return one_way
        ring = one_way + transfer.n_calls * ring_s + share * transfer.n_bytes / bandwidth
        tree_s = 2 * ((per_node - 1) * self.inside.latency_s + math.log2(n_nodes) * self.between.latency_s)
        tree = transfer.n_calls * (self.launch_s + tree_s) + 2 * transfer.n_bytes / bandwidth
        return min(ring, tree)


# 380 of NVLink 4's 450 GB/s is what NVIDIA/nccl issue 1264 measured; 45 of a 400 Gb/s card's 50 is assumed. Hops as
# NCCL's tuning model has them (hwLat, Ring, Simple). INTERFERENCE is fitted in benchmarks/scaling.py.
INTERFERENCE = 0.44
NVLINK = Link(380e9, 3.4e-6)
H100_INFINIBAND = Cluster(NVLINK, Link(45e9, 14e-6), interference=INTERFERENCE)
# One 100 Gb/s card for the whole node, over TCP: an eighth of 11 GB/s each, 50 us a hop. Assumed.
H100_ETHERNET = Cluster(NVLINK, Link(11e9 / 8, 50e-6), interference=INTERFERENCE)


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of a step go.

    compute_s: forward and backward. exposed_s: waiting for the wire. interference_s: what compute loses to the
    communication hidden behind it. update_s: the optimizer.
    """

    compute_s: float
    exposed_s: float
    interference_s: float
    update_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.interference_s + self.update_s

    @property
    def efficiency(self) -> float:
        """Share of the step in which the devices do what one of them would do alone."""
        return (self.compute_s + self.update_s) / self.seconds


def step_time(
    model: Model,
    layout: Layout,
    network: Network,
    compute_s: float,
    update_s: float = 0.0,
    recompute: bool = False,
) -> StepTime:
    """The time of one step.

    Args:
        compute_s: of one micro-batch forward and backward on one tensor rank.
        update_s: of the optimizer over all parameters on one device; each process updates its share.
        recompute: blocks run their forward again in the backward; compute_s includes it.
    """
    wire, end = _run(list(stages(model, layout, recompute)), layout, network, compute_s)
    total = compute_s * layout.n_micro_batches
    exposed = max(0.0, end - total)
    shared = held(layout, model.shapes) / layout.n_shards / model.n_parameters
    return StepTime(total, exposed, network.interference * max(0.0, wire - exposed), update_s * shared)


def _run(step: Sequence[Stage], layout: Layout, network: Network, compute_s: float) -> tuple[float, float]:
    """Play the stages on two clocks: seconds in which anything travels, and when the last of all is done.

    Each axis of the mesh is a queue of its own. What a stage needs is sent for when the one before it starts, as
    fully_shard does; what it gives is sent when it ends.
    """
    now = wire = 0.0
    free: defaultdict[Axis, float] = defaultdict(float)

    def send(transfers: Iterable[Transfer], at: float) -> float:
        nonlocal wire
        for transfer in transfers:
            seconds = network.seconds(transfer, *layout.group(transfer.axis))
            at = free[transfer.axis] = max(at, free[transfer.axis]) + seconds
            wire += seconds
        return at

    came = send(step[0].before, 0.0)
    for stage, following in zip_longest(step, step[1:]):
        started = max(now, came)
        came = send(following.before, started) if following else 0.0
        now = send(stage.during, started) + stage.share * compute_s
        send(stage.after, now)
    return wire, max(now, *free.values(), 0.0)


def update_s(model: Model, cluster: Cluster) -> float:
    """Of AdamW over all parameters on one device, which is bound by memory."""
    return _UPDATE_BYTES * model.n_parameters / cluster.memory_bytes_per_s


def tokens_per_s(layout: Layout, time: StepTime) -> float:
    """Of all devices."""
    return layout.tokens / time.seconds
