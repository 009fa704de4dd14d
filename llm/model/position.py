"""Where a token stands: learned and sinusoidal vectors are added to the embedding, rotations are applied to heads, and
relative positions are added to the scores.

Nothing here is a stored table except the learned ones. Angles are computed in fp32 from the positions, once per forward
for all layers: that costs less than one norm, has no end, needs no buffer to survive a meta-device build, and cannot be
rounded to bf16 by a cast of the module (at position 4,000 bf16 has a resolution of 16).
"""

import math

import torch
from torch import Tensor, nn

from llm.model.config import RopeScaling, TransformerConfig
from llm.model.initialisation import Embedding

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine of `rotate`, each [.., T, 1, K], fp32


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Of wavelengths growing geometrically from 2π to 2π·theta: fp32 [width/2]."""
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves stretched, short ones kept, those between in part (see RopeScaling)."""
    turns = scaling.original_length * frequencies / (2 * math.pi)  # in the context that was trained on
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[.., T], [width/2] -> [.., T, width/2]. A product, not torch.outer: as a matmul, autocast would do it in bf16."""
    return positions.unsqueeze(-1).float() * frequencies


def build_rotation(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """The rotations of rotary embedding (Su et al. 2021, arXiv:2104.09864) for positions [T] or [B, T]."""
    frequencies = _frequencies(head_dim, theta, positions.device)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = _angles(positions, frequencies).unsqueeze(-2)  # [.., T, 1, K/2]: the same for every head
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
        self.table = Embedding(config, config.max_length, config.dim)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden + self.table(positions)


class SinusoidalPosition(nn.Module):
    """Scales the embedding by sqrt(dim) and adds sines and cosines (Vaswani et al. 2017, sections 3.4 and 3.5).

    Sines first, then cosines, as in the authors' tensor2tensor and in Marian; the paper's formula interleaves them,
    which is the same up to a fixed permutation of channels.

    Args:
        dim: whose root it is.
    """

    def __init__(self, dim: float) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        angles = _angles(positions, _frequencies(hidden.shape[-1], 10000.0, positions.device))
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return hidden * self.scale + waves.to(hidden.dtype)


class RelativePosition(nn.Module):
    """A trained bias on the scores for each head and distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Near distances have a bucket each, farther ones share buckets that grow geometrically, and all from
    relative_distance on share the last one. Where both sides are seen, each has half of the buckets.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.n_buckets = config.relative_buckets
        self.max_distance = config.relative_distance
        self.table = Embedding(config, config.relative_buckets, config.n_heads, "hidden")

    def forward(self, offsets: Tensor) -> Tensor:
        """Key place less query place [T, S] -> [1, H, T, S]."""
        return self.table(self.buckets(offsets)).permute(2, 0, 1).unsqueeze(0)

    def buckets(self, offsets: Tensor) -> Tensor:
        """The bucket of each offset, 0 to n_buckets - 1."""
        n_buckets, side = self.n_buckets, torch.zeros_like(offsets)
        if self.causal:
            distance = (-offsets).clamp(min=0)
        else:
            n_buckets //= 2
            side, distance = (offsets > 0) * n_buckets, offsets.abs()
        n_near = n_buckets // 2
        growth = torch.log(distance.clamp(min=1).float() / n_near) / math.log(self.max_distance / n_near)
        far = n_near + (growth * (n_buckets - n_near)).long()
        return side + torch.where(distance < n_near, distance, far.clamp(max=n_buckets - 1))
