"""How sure a share is."""

from __future__ import annotations

import math

_Z = 1.959964  # of the normal distribution lies 95 % between -z and z


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share seen in `n` independent trials (Wilson 1927): never outside 0 to 1, and
    right for few trials too."""
    if not n:
        return 0.0, 1.0
    centre = share + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)
