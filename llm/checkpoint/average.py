"""The mean of several checkpoints of a run, which is often better than the last one (Vaswani et al. 2017, 6.1)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

from llm.checkpoint import store
from llm.checkpoint.adapter import PREFIX, adapter_of, merged
from llm.checkpoint.store import CheckpointError, read_tensors, steps, unused


def average(run: str | Path, out: str | Path, n_last: int) -> list[Path]:
    """Write the mean of the weights of the last `n_last` checkpoints of `run` as a step directory; returns which.

    Sums are of float64, so that the order says nothing; what is no floating-point number is that of the last. Adapters
    are merged first, and what is written has none: the mean of products is not the product of means.

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
        last = _whole(step)
        for name, weight in last.items():
            if weight.is_floating_point():
                sums[name] = weight.double() if name not in sums else sums[name] + weight.double()
    mean = {name: (sums[name] / n_last).to(weight.dtype) if name in sums else weight for name, weight in last.items()}
    cfg = yaml.safe_load((taken[-1] / "config.yaml").read_text())
    cfg["adapter"] = cfg["objective"]["adapter"] = None
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        config.write_text(yaml.safe_dump(cfg, sort_keys=False))
        store.save(out, mean, {}, [config, taken[-1] / "tokenizer"])
    return taken


def _whole(step: Path) -> dict[str, Tensor]:
    """The weights of a step directory, an adapter's merged into the others."""
    tensors, node = read_tensors(step, PREFIX), adapter_of(step)
    return tensors if node is None else merged(tensors, node["alpha"] / node["r"])
