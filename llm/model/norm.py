"""Normalisation, chosen by the configuration."""

import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight (Zhang and Sennrich 2019), computed and given back in the weight's dtype.

    So in fp32 under autocast, as layer_norm is on a GPU. Of mixed dtypes torch has only a slow, warning version.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


def build_norm(config: TransformerConfig, width: int) -> nn.Module:
    """A norm over the last `width` channels."""
    if config.norm == "rms":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias is True)
