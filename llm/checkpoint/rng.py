"""The random number generators of a process, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """State of python's, numpy's and torch's generators; numpy's words as a tensor, which weights_only can read."""
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "accelerator": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue where `rng_state` was taken."""
    random.setstate(_tuples(state["python"]))
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["accelerator"])


def _tuples(value: Any) -> Any:
    """Lists back to the tuples that `random.setstate` insists on."""
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
