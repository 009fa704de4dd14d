"""What this machine computes fast."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products of bfloat16 matrices: every GPU that is served here, and of the CPUs
    those with AVX-512 BF16, AMX or their like."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
