"""Who sees whom: built once per forward, shared by every layer.

A row of packed documents is a mask with blocks along its diagonal, most of which is hidden. Three ways to say so:

dense   every pair of places; whatever kernel there is takes it
runs    the lengths of the documents, each attended by itself: what a CPU does best where rows are long
blocks  which tiles of 128 by 128 anybody sees at all, for flex_attention, which skips the others
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Way = Literal["dense", "runs", "blocks"]

_BLOCK = 128  # places in a tile of flex_attention
# Shorter rows are done sooner as a whole. Forward and backward on one core, 4 heads of 64: eight rows of 256 with
# documents of 100 tokens took 38 ms dense and 51 ms by run, four of 1,024 with documents of 200 took 321 and 122 ms.
LONG = 512


class Runs(NamedTuple):
    """Of each row: the lengths of its runs of queries and of keys, and for each run of queries which one of keys it
    sees; None: none of them."""

    queries: list[list[int]]
    keys: list[list[int]]
    seen: list[list[int | None]]


class Mask(NamedTuple):
    """What a query sees of the keys; without `visible`, `runs` and `blocks` everything that `causal` allows.

    visible  bool [B or 1, 1, T, S], True where query t sees key s; or float [B or 1, H, T, S], added to the scores,
             -inf where it does not
    causal   query t sees keys 0..t, of the row or of its run; never with `visible` or `blocks`, which say so themselves
    runs     documents, one by one
    blocks   for flex_attention
    """

    visible: Tensor | None
    causal: bool
    runs: Runs | None = None
    blocks: BlockMask | None = None


class Places(NamedTuple):
    """What masks are made of: the rows' new tokens, those before them in a cache, and whose each is.

    length     T, new tokens
    n_past     those before them; S = n_past + T keys
    documents  [B, S] of the keys, the last T those of the queries; 0 = padding. None: all are one document
    way        what the masks of documents and windows may be, besides dense
    """

    length: int
    n_past: int
    documents: Tensor | None
    device: torch.device
    way: Way = "dense"

    def offsets(self) -> Tensor:
        """Key place less query place, [T, S]. Within a document the same as the difference of positions."""
        queries = torch.arange(self.n_past, self.n_past + self.length, device=self.device)
        return torch.arange(self.n_past + self.length, device=self.device) - queries.unsqueeze(1)


def self_mask(places: Places, *, causal: bool, window: int | None = None) -> Mask:
    """Each token sees its own document: all of it or, if `causal`, what is not later; with `window` the nearest ones.

    Padding (document 0) counts as one more document. So no real token sees it, yet each padded query sees itself: a row
    of the mask is never empty, whose softmax would be NaN.
    """
    length, n_past, documents, _, way = places
    reach = None if window is None else window - 1 if causal else window // 2
    if reach is not None and reach >= n_past + length - 1:
        reach = None
    single = length == 1  # the last token of all, to which nothing is later
    if documents is None and reach is None and (not causal or n_past == 0 or single):
        return Mask(None, causal=causal and not single)
    if way == "runs" and documents is not None and reach is None and n_past == 0:
        mask = _by_run(documents, documents, causal=causal)
        if mask is not None:
            return mask
    if way == "blocks" and n_past == 0:
        rows = torch.zeros(1, length, dtype=torch.long, device=places.device) if documents is None else documents
        return Mask(None, causal=False, blocks=block_mask(rows, rows, causal=causal, reach=reach))
    offsets = places.offsets()
    seen = (offsets <= 0) if causal else torch.ones_like(offsets, dtype=torch.bool)
    if reach is not None:
        seen &= offsets >= -reach if causal else offsets.abs() <= reach
    if documents is None:
        return Mask(seen[None, None], causal=False)
    same = documents[:, n_past:].unsqueeze(2) == documents.unsqueeze(1)  # [B, T, S]
    return Mask((same & seen).unsqueeze(1), causal=False)


def cross_mask(documents: Tensor | None, source_documents: Tensor | None, length: int, way: Way = "dense") -> Mask:
    """Target document n sees source document n: documents [B, T] and [B, S]; None: one document without padding.

    What padded queries see is of no consequence: all if dense, so that none sees nothing, else padding or nothing.
    """
    if source_documents is None and documents is None:
        return Mask(None, causal=False)
    if source_documents is None:
        raise ValueError("documents of the target need documents of the source: which of it may each see?")
    if documents is None:
        documents = torch.ones(len(source_documents), length, dtype=torch.long, device=source_documents.device)
    if way == "runs":
        mask = _by_run(documents, source_documents, causal=False)
        if mask is not None:
            return mask
    if way == "blocks":
        return Mask(None, causal=False, blocks=block_mask(documents, source_documents, causal=False))
    queries = documents.unsqueeze(2)  # [B, T, 1]
    visible = (queries == source_documents.unsqueeze(1)) | (queries == 0)  # [B, T, S]
    return Mask(visible.unsqueeze(1), causal=False)


def _by_run(queries: Tensor, keys: Tensor, *, causal: bool) -> Mask | None:
    """The mask of documents [B, T] and [B, S] that lie in runs; None where a dense one is faster. Waits for the device.

    Where every row is one document, as without a document mask, nothing is hidden but the future.
    """
    found, other = _runs(queries), _runs(keys)
    if all(len(row) == 1 and row == opposite for row, opposite in zip(_names(found), _names(other), strict=True)):
        return Mask(None, causal=causal)
    if max(queries.shape[1], keys.shape[1]) < LONG:
        return None
    seen = [
        [opposite.index(name) if name in opposite else None for name in row]
        for row, opposite in zip(_names(found), _names(other), strict=True)
    ]
    return Mask(None, causal=causal, runs=Runs(_lengths(found), _lengths(other), seen))


def _runs(documents: Tensor) -> list[list[tuple[int, int]]]:
    """The document and the length of each run, of each row."""
    found = [torch.unique_consecutive(row, return_counts=True) for row in documents]
    return [list(zip(names.tolist(), counts.tolist(), strict=True)) for names, counts in found]


def _names(runs: list[list[tuple[int, int]]]) -> list[list[int]]:
    return [[name for name, _ in row] for row in runs]


def _lengths(runs: list[list[tuple[int, int]]]) -> list[list[int]]:
    return [[length for _, length in row] for row in runs]


def block_mask(queries: Tensor, keys: Tensor, *, causal: bool, reach: int | None = None) -> BlockMask:
    """Which tiles of 128 by 128 are seen, of documents [B, T] and [B, S].

    From the first and the last document of each tile, of which documents in order need no more: the mask of all pairs,
    which torch's own create_block_mask looks through, is never made. A tile that is seen without exception is marked as
    such, and the kernel does not ask about its places.
    """
    first_query, last_query = _documents_of_tiles(queries)  # [B, n, 1]
    first_key, last_key = (ends.transpose(1, 2) for ends in _documents_of_tiles(keys))  # [B, 1, m]
    # Key place less query place of a tile, from its lower left corner to its upper right one.
    start = torch.arange(first_key.shape[2], device=keys.device) * _BLOCK
    start = start - torch.arange(first_query.shape[1], device=queries.device).unsqueeze(1) * _BLOCK  # [n, m]
    lowest, highest = start - (_BLOCK - 1), start + (_BLOCK - 1)
    some = (first_query <= last_key) & (first_key <= last_query)
    every = (first_query == last_query) & (first_key == last_key) & (first_query == first_key)
    if causal:
        some, every = some & (lowest <= 0), every & (highest <= 0)
    if reach is not None:
        some, every = some & (highest >= -reach), every & (lowest >= -reach)
        if not causal:
            some, every = some & (lowest <= reach), every & (highest <= reach)
    length, source_length = queries.shape[1], keys.shape[1]
    # A tile that juts out of the row has places that nobody may see.
    every[:, length // _BLOCK :] = False
    every[:, :, source_length // _BLOCK :] = False
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(queries, keys, causal, reach),
        seq_lengths=(length, source_length),
    )


def _documents_of_tiles(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest document of each tile, [B, n, 1] each; padding comes after all others."""
    ordered = torch.where(documents == 0, torch.iinfo(documents.dtype).max, documents)
    missing = -documents.shape[1] % _BLOCK
    ordered = torch.cat((ordered, ordered[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, _BLOCK))
    return ordered.amin(2, keepdim=True), ordered.amax(2, keepdim=True)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, n, m] -> how many of each row of tiles there are [B, 1, n], and which, those first [B, 1, n, m]."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


def _visible(queries: Tensor, keys: Tensor, causal: bool, reach: int | None) -> Callable[..., Tensor]:
    """Whether query place q sees key place k of row b, as flex_attention asks."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if len(queries) > 1 else b * 0  # one row may stand for all
        seen = queries[row, q] == keys[row, k]
        if causal:
            seen = seen & (k <= q)
        if reach is not None:
            seen = seen & (k - q >= -reach)
            if not causal:
                seen = seen & (k - q <= reach)
        return seen

    return visible


def add_bias(mask: Mask, bias: Tensor, places: Places) -> Mask:
    """The mask with `bias` [1, H, T, S] added to the scores it lets through."""
    visible = mask.visible
    if visible is None and mask.causal:
        visible = (places.offsets() <= 0)[None, None]
    return Mask(bias if visible is None else bias.masked_fill(~visible, -torch.inf), causal=False)
