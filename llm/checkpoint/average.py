"""The mean of several checkpoints of a run, which is often better than the last one (Vaswani et al. 2017, 6.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llm.checkpoint import store
from llm.checkpoint.load import PREFIX
from llm.checkpoint.store import CheckpointError, read_tensors, steps, unused


def average(run: str | Path, out: str | Path, n_last: int) -> list[Path]:
    """Write the mean of the weights of the last `n_last` checkpoints of `run` as a step directory; returns which.

    Sums are of float64, so that the order says nothing; what is no floating-point number is that of the last.

    Raises:
        CheckpointError: if `out` exists, or there are fewer.
    """
    out, found = unused(out), steps(run)
    if not 1 <= n_last <= len(found):
        raise CheckpointError(
            f"{run}: has {len(found)} checkpoints, not {n_last} - train with callback.checkpoint.save_top_k={n_last}, "
            "or average fewer"
        )
    taken = found[-n_last:]
    sums: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for step in taken:
        store.find(step)  # verified
        last = read_tensors(step, PREFIX)
        for name, weight in last.items():
            if weight.is_floating_point():
                sums[name] = weight.double() if name not in sums else sums[name] + weight.double()
    mean = {name: (sums[name] / n_last).to(weight.dtype) if name in sums else weight for name, weight in last.items()}
    with torch.no_grad():
        store.save(out, mean, {}, [taken[-1] / "config.yaml", taken[-1] / "tokenizer"])
    return taken
