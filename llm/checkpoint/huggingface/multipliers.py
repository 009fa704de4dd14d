"""A network under model.parametrization=mup as one without multipliers, which is all that published architectures
have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llm.model import TransformerConfig
from llm.model.parametrization import base_width, logits_scale, scores_scale


def folded(config: TransformerConfig, state: Mapping[str, Tensor]) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The configuration and the weights of a network of the standard parametrization that computes the same.

    What scores are multiplied with becomes part of the queries; what logits are, part of the head, which is no longer
    the embedding then; what an embedding is beside sinusoidal positions, part of the embedding.
    """
    standard = replace(config, parametrization="standard", base_dim=None, base_ffn_dim=None)
    state = dict(state)
    if config.growth == 1:
        return standard, state
    scores = scores_scale(config)
    if scores is not None:
        usual = 1 / math.sqrt(config.head_width) if config.scale_attention else 1.0
        last = "query_norm" if config.qk_norm else "query"
        for name in state:
            if name.endswith((f"attention.{last}.weight", f"attention.{last}.bias")):
                state[name] = state[name] * (scores / usual)
    if "head.weight" in state:
        state["head.weight"] = state["head.weight"] * logits_scale(config)
        standard = replace(standard, tie_embeddings=False, scale_logits=False)
    if config.position == "sinusoidal":
        state["embed.weight"] = state["embed.weight"] * math.sqrt(base_width(config, "dim") / config.dim)
    return standard, state
