"""The process group that collectives run over."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from llm.launch import Place
from llm.strategy.interface import choose_interface
from llm.strategy.rendezvous import current

_joined = False  # by us: a group that was there before stays when we leave


def join_process_group(here: Place, device: torch.device, timeout_s: float) -> None:
    """Initialise the default process group, of one process too; if there is one already, that one serves.

    CPU tensors travel over gloo and, where there are GPUs, CUDA tensors over NCCL.

    Args:
        here: which rank this is.
        device: what this process computes on.
        timeout_s: after which a collective that some rank does not join is an error.
    """
    global _joined
    if dist.is_initialized():
        return
    store = current().store
    if store is not None:
        store.set_timeout(datetime.timedelta(seconds=timeout_s))  # by which backends wait for each other at first
    choose_interface(current())
    cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.HashStore() if store is None else dist.PrefixStore("process_group", store),
        rank=here.rank,
        world_size=here.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if cuda else None,
    )
    _joined = True


def leave() -> None:
    """End together with the other processes, when nobody has anything to send any more."""
    global _joined
    current().leave()
    if _joined:
        dist.destroy_process_group()
        _joined = False


def seed_dropout(data_rank: int) -> None:
    """Give each process with data of its own dropout of its own, once the weights, which are the same, are drawn."""
    torch.manual_seed(torch.initial_seed() + 1 + data_rank)


def set_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Change when a collective over `group` that some rank does not join becomes an error."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Make this process rank 0 of a group of any size whose collectives return at once and move nothing.

    For counting collectives and looking at shards. Numbers that a collective should have brought are wrong.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(f"fake_ranks({world_size}): this process has a process group already - destroy that first")
    excepthook = sys.excepthook  # torch puts "[rank0]:" before what the last one prints, once more for each group
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook
        _clear_sharding_prop_cache()  # DTensor would take an equal mesh of the next group for this one's
