"""What torch.optim's `step(closure)` does first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What `closure` returns, called under grad; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
