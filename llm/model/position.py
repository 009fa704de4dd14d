"""Where a token stands: learned and sinusoidal vectors are added to the embedding, rotations are applied to heads.

Nothing here is a stored table except the learned one. Angles are computed in fp32 from the positions, once per forward
for all layers: that costs less than one norm, has no end, needs no buffer to survive a meta-device build, and cannot be
rounded to bf16 by a cast of the module (at position 4,000 bf16 has a resolution of 16).
"""

import math

import torch
from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.initialisation import Embedding

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine of `rotate`, each [.., T, 1, K], fp32


def _angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """Angle of each position at wavelengths growing geometrically from 2π to 2π·theta: [.., T] -> [.., T, width/2]."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    # A product, not torch.outer: as a matmul, autocast would do it in bf16.
    return positions.unsqueeze(-1).float() * theta**-exponents


def build_rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotations of rotary embedding (Su et al. 2021, arXiv:2104.09864) for positions [T] or [B, T]."""
    angles = _angles(positions, head_dim, theta).unsqueeze(-2)  # [.., T, 1, K/2]: the same for every head
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel pairs (i, i + K/2) of heads [B, T, H, K]: Hugging Face's rotate-half order, so weights move freely.

    Computed in fp32 and given back in the dtype of `heads`, whatever autocast or a cast of the module made of it.
    """
    cosine, signed_sine = rotation
    partners = heads.float().roll(heads.shape[-1] // 2, dims=-1)  # channel i meets i + K/2, and the other way round
    return torch.addcmul(heads.float() * cosine, partners, signed_sine).to(heads.dtype)


class LearnedPosition(nn.Module):
    """Adds a trained vector for each of max_length positions (Radford et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = Embedding(config.max_length, config.dim)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden + self.table(positions)


class SinusoidalPosition(nn.Module):
    """Scales the embedding by sqrt(dim) and adds sines and cosines (Vaswani et al. 2017, sections 3.4 and 3.5).

    Sines first, then cosines, as in the authors' tensor2tensor and in Marian; the paper's formula interleaves them,
    which is the same up to a fixed permutation of channels.
    """

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        angles = _angles(positions, hidden.shape[-1], 10000.0)
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return hidden * math.sqrt(hidden.shape[-1]) + waves.to(hidden.dtype)
