"""How initial weights, multipliers and learning rates go with the width of a network: `model.parametrization`.

standard  they do not, apart from what model.initialisation says; the best learning rate is another one at each width
mup       the maximal update parametrization (Yang et al. 2022, arXiv:2203.03466), under which the best learning rate of
          a narrow network is that of a wide one. At dim = base_dim it is the standard parametrization, to the bit

Relative to what it was at base_dim (marked 0), as in the paper's tables 3 and 8, with n the inputs of a matrix:

role     what                                     deviation     AdamW's rate   Muon's rate   in the forward
input    embedding, position and segment tables   as it was     1              -
vector   biases, norms, biases on the scores      as it was     1              -
hidden   a matrix from width to width             sqrt(n0 / n)  n0 / n         spectral
output   a head, width to a fixed number          n0 / n        n0 / n         -
         the vocabulary head, tied                the embedding's                            scores · dim0 / dim
         attention                                                                           scores · K0 / K

A layer carries its deviation as `std` and, for the optimizer, the shape that its weight had as `base_shape`; weights
without one have the rates as they are (llm/optimizer/groups.py turns shapes into rates, Muon's too). What decays by
lr · weight_decay in a step goes on to do so. The sqrt(dim) that sinusoidal positions multiply the embedding with, and
model.scale_logits divides by, stays what it was at base_dim.

Only widths grow: for depth, batch size and length of training the theory has other rules.
"""

import math
from typing import Literal

from llm.model.config import TransformerConfig

# A width of the network by its name grows with it; a number does not.
Width = Literal["dim", "queries", "keys", "ffn"] | int


def width(config: TransformerConfig, name: Width) -> int:
    """How wide that is."""
    if isinstance(name, int):
        return name
    widths = {
        "dim": config.dim,
        "queries": config.n_heads * config.head_width,
        "keys": config.kv_heads * config.head_width,
        "ffn": config.ffn_width,
    }
    return widths[name]


def base_width(config: TransformerConfig, name: Width) -> float:
    """How wide it was at base_dim: heads were fewer or narrower in proportion to dim."""
    if name == "ffn":
        return config.base_ffn_width
    return width(config, name) / (1 if isinstance(name, int) else config.growth)


def deviation_factor(config: TransformerConfig, n_in: Width, n_out: Width) -> float:
    """What the deviation that a matrix of these widths had at base_dim is multiplied with."""
    shrunk = base_width(config, n_in) / width(config, n_in)
    return shrunk if isinstance(n_out, int) else math.sqrt(shrunk)


def base_shape(config: TransformerConfig, n_in: Width, n_out: Width) -> tuple[float, float] | None:
    """Outputs and inputs at base_dim, as a weight's shape has them; None under the standard parametrization."""
    if config.parametrization == "standard":
        return None
    return base_width(config, n_out), base_width(config, n_in)


def scores_scale(config: TransformerConfig) -> float | None:
    """What attention multiplies its scores with: at base_dim 1 / sqrt(head_dim), or 1; beyond, falling as 1 / head_dim,
    since trained queries and keys are no longer independent (Yang et al. 2022, definition 4.1). None: the kernel's own,
    1 / sqrt(head_dim)."""
    base, now = config.base_head_width, config.head_width
    if not config.scale_attention:
        return base / now
    return None if base == now else math.sqrt(base) / now


def logits_scale(config: TransformerConfig) -> float:
    """What hidden states are multiplied with before the head."""
    scale = (config.dim / config.growth) ** -0.5 if config.scale_logits else 1.0
    return scale / config.growth if config.tie_embeddings else scale
