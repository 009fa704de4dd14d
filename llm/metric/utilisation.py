"""Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import re

# Dense bf16 peak in FLOP/s, from the vendors' data sheets (the larger figures printed there assume sparsity).
# Longest name first where one contains another.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device torch calls `device_name`, in FLOP/s; None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def model_flops_utilisation(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Share of the peak that the model's own FLOPs use; recomputation does not count.

    Args:
        tokens_per_s: on one device.
        flops_per_token: forward and backward, 6N + 12 L H K T (`Transformer.flops_per_token`).
        peak: FLOP/s of one device.
    """
    return tokens_per_s * flops_per_token / peak
