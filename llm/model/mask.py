"""Who sees whom: built once per forward, shared by every layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """What scaled_dot_product_attention is told.

    visible  bool [B or 1, 1, T, S], True where query t sees key s; None = everything that `causal` allows
    causal   query t sees keys 0..t; the kernel's own fast path, only ever without `visible`
    """

    visible: Tensor | None
    causal: bool


def causal_mask(length: int, n_past: int, device: torch.device) -> Mask:
    """Each of `length` new tokens sees the `n_past` tokens before them, the new ones before it, and itself."""
    if n_past == 0:
        return Mask(None, causal=length > 1)
    if length == 1:
        return Mask(None, causal=False)
    return Mask(_not_later(length, n_past, device)[None, None], causal=False)


def document_mask(documents: Tensor, past: Tensor | None = None) -> Mask:
    """Causal, and only within the own document: `documents` [B, T], those of the tokens before them `past` [B, S - T].

    Padding (document 0) counts as one more document. So no real token sees it, yet each padded query sees itself:
    a row of the mask is never empty, whose softmax would be NaN.
    """
    keys = documents if past is None else torch.cat((past, documents), dim=1)
    length, n_past = documents.shape[1], keys.shape[1] - documents.shape[1]
    same = documents.unsqueeze(2) == keys.unsqueeze(1)  # [B, T, S]
    return Mask((same & _not_later(length, n_past, documents.device)).unsqueeze(1), causal=False)


def _not_later(length: int, n_past: int, device: torch.device) -> Tensor:
    return torch.ones(length, n_past + length, dtype=torch.bool, device=device).tril(n_past)
