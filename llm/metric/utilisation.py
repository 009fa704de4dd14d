"""Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""

from __future__ import annotations


def model_flops_utilisation(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Share of the peak that the model's own FLOPs use; recomputation does not count.

    Args:
        tokens_per_s: on one device.
        flops_per_token: forward and backward, 6N + 12 L H K T (`Transformer.flops_per_token`).
        peak: FLOP/s of one device.
    """
    return tokens_per_s * flops_per_token / peak
