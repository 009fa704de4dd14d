"""What travels between processes in a run: sums, clipping, packed running totals, tensors brought to where they are
worked on."""

from llm.reduce.clip import clip_gradients
from llm.reduce.collectives import (
    AnyRaised,
    all_gather,
    all_sum,
    all_sum_later,
    from_first,
    gather_objects,
    n_processes,
    rank,
    to_device,
    use,
    world_size,
)
from llm.reduce.owned import Owned, is_spread, n_copies, own_part
from llm.reduce.totals import Reading, Sum, Summand, Totals

__all__ = [
    "AnyRaised",
    "Owned",
    "Reading",
    "Sum",
    "Summand",
    "Totals",
    "all_gather",
    "all_sum",
    "all_sum_later",
    "clip_gradients",
    "from_first",
    "gather_objects",
    "is_spread",
    "n_copies",
    "n_processes",
    "own_part",
    "rank",
    "to_device",
    "use",
    "world_size",
]
