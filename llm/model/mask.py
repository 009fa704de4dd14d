"""Who sees whom: built once per forward, shared by every layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """What scaled_dot_product_attention is told.

    visible  bool [B or 1, 1, T, S], True where query t sees key s; or float [B or 1, H, T, S], added to the scores,
             -inf where it does not; None = everything that `causal` allows
    causal   query t sees keys 0..t; the kernel's own fast path, only ever without `visible`
    """

    visible: Tensor | None
    causal: bool


class Places(NamedTuple):
    """What masks are made of: the rows' new tokens, those before them in a cache, and whose each is.

    length     T, new tokens
    n_past     those before them; S = n_past + T keys
    documents  [B, S] of the keys, the last T those of the queries; 0 = padding. None: all are one document
    """

    length: int
    n_past: int
    documents: Tensor | None
    device: torch.device

    def offsets(self) -> Tensor:
        """Key place less query place, [T, S]. Within a document the same as the difference of positions."""
        queries = torch.arange(self.n_past, self.n_past + self.length, device=self.device)
        return torch.arange(self.n_past + self.length, device=self.device) - queries.unsqueeze(1)


def self_mask(places: Places, *, causal: bool, window: int | None = None) -> Mask:
    """Each token sees its own document: all of it or, if `causal`, what is not later; with `window` the nearest ones.

    Padding (document 0) counts as one more document. So no real token sees it, yet each padded query sees itself: a row
    of the mask is never empty, whose softmax would be NaN.
    """
    length, n_past, documents, _ = places
    reach = None if window is None else window - 1 if causal else window // 2
    if reach is not None and reach >= n_past + length - 1:
        reach = None
    single = length == 1  # the last token of all, to which nothing is later
    if documents is None and reach is None and (not causal or n_past == 0 or single):
        return Mask(None, causal=causal and not single)
    offsets = places.offsets()
    seen = (offsets <= 0) if causal else torch.ones_like(offsets, dtype=torch.bool)
    if reach is not None:
        seen &= offsets >= -reach if causal else offsets.abs() <= reach
    if documents is None:
        return Mask(seen[None, None], causal=False)
    same = documents[:, n_past:].unsqueeze(2) == documents.unsqueeze(1)  # [B, T, S]
    return Mask((same & seen).unsqueeze(1), causal=False)


def cross_mask(documents: Tensor | None, source_documents: Tensor | None, length: int) -> Mask:
    """Target document n sees source document n: documents [B, T] and [B, S]; None: one document without padding.

    Padded queries see everything, so that none sees nothing.
    """
    if source_documents is None and documents is None:
        return Mask(None, causal=False)
    if source_documents is None:
        raise ValueError("documents of the target need documents of the source: which of it may each see?")
    if documents is None:
        documents = torch.ones(len(source_documents), length, dtype=torch.long, device=source_documents.device)
    queries = documents.unsqueeze(2)  # [B, T, 1]
    visible = (queries == source_documents.unsqueeze(1)) | (queries == 0)  # [B, T, S]
    return Mask(visible.unsqueeze(1), causal=False)


def add_bias(mask: Mask, bias: Tensor, places: Places) -> Mask:
    """The mask with `bias` [1, H, T, S] added to the scores it lets through."""
    visible = mask.visible
    if visible is None and mask.causal:
        visible = (places.offsets() <= 0)[None, None]
    return Mask(bias if visible is None else bias.masked_fill(~visible, -torch.inf), causal=False)
