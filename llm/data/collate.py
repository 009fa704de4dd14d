"""Rows of prepared tokens -> the batches that an objective sees. B rows, T positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm.data.prepare import Rows

IGNORED = -100  # a label that is not predicted, as in torch's cross entropy

Batch = dict[str, Tensor]


@dataclass
class Step:
    """This process's share of one optimizer step: `index` counts steps from 0."""

    index: int
    micro_batches: list[Batch]

    def pin_memory(self) -> Step:
        """Called by the DataLoader, which knows dicts and lists but not this class."""
        pinned = [{name: value.pin_memory() for name, value in batch.items()} for batch in self.micro_batches]
        return Step(self.index, pinned)


def assemble(rows: Rows, chosen: np.ndarray, document_mask: bool, pad_id: int) -> dict[str, np.ndarray]:
    """Rows `chosen` of one source as tokens, labels, documents, positions, all int64 [B, T]; -1 gives an empty row."""
    length = rows.max_length
    n_rows = len(chosen)
    empty = chosen < 0
    first = np.where(chosen > 0, rows.ends[chosen - 1], 0)
    n_pieces = np.where(empty, 0, rows.ends[chosen] - first)
    # Every row gets one more piece, the padding behind its documents (of length 0 in a full row): so pieces cover all
    # positions in order, and one gather reads the batch.
    padding = np.cumsum(n_pieces + 1) - 1
    nth = _ranges(n_pieces + 1)
    piece = np.minimum(np.repeat(first, n_pieces + 1) + nth, len(rows.starts) - 1)
    starts, lengths = rows.starts[piece], rows.lengths[piece].astype(np.int64)
    lengths[padding] = 0
    filled = np.add.reduceat(lengths, padding - n_pieces)
    lengths[padding] = length - filled
    starts[padding] = 0

    positions = _ranges(lengths)
    where = np.repeat(starts, lengths) + positions
    tokens = rows.tokens.take(where, mode="clip").astype(np.int64)  # padding may point behind the end of a short file
    where += 1
    labels = rows.tokens.take(where, mode="clip").astype(np.int64)
    documents = np.repeat(nth + 1, lengths)
    if filled.sum() < n_rows * length:
        unused = np.arange(length) >= filled[:, None]
        unused = unused.reshape(-1)
        tokens[unused], labels[unused], documents[unused] = pad_id, IGNORED, 0
        positions[unused] = 0
    if not document_mask:
        documents = (documents > 0).astype(np.int64)
        positions = np.tile(np.arange(length), n_rows)
    arrays = {"tokens": tokens, "labels": labels, "documents": documents, "positions": positions}
    return {name: array.reshape(n_rows, length) for name, array in arrays.items()}


def assemble_mixture(
    sources: list[Rows], source: np.ndarray, chosen: np.ndarray, document_mask: bool, pad_id: int
) -> dict[str, np.ndarray]:
    """As `assemble`, row i coming from `sources[source[i]]`; adds samples (int64 [B]), counted over all sources."""
    offsets = np.cumsum([0, *map(len, sources)])[:-1]
    samples = {"samples": np.where(chosen < 0, -1, chosen + offsets[source])}
    if len(sources) == 1:
        return assemble(sources[0], chosen, document_mask, pad_id) | samples
    parts = [(mine, index) for index in range(len(sources)) if len(mine := np.flatnonzero(source == index))]
    made = [assemble(sources[index], chosen[mine], document_mask, pad_id) for mine, index in parts]
    back = np.argsort(np.concatenate([mine for mine, _ in parts]))
    return {name: np.concatenate([part[name] for part in made])[back] for name in made[0]} | samples


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def split(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` rows; the last may have fewer."""
    n_rows = len(batch["tokens"])
    return [{name: value[at : at + size] for name, value in batch.items()} for at in range(0, n_rows, size)]


def label_bytes(labels: np.ndarray, token_bytes: np.ndarray) -> np.ndarray:
    """int64 [B]: UTF-8 bytes of the text that `labels` [B, T] stand for."""
    predicted = labels != IGNORED
    return np.where(predicted, token_bytes[np.where(predicted, labels, 0)], 0).sum(1, dtype=np.int64)


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """0 .. size-1 for each size, end to end: int64 [sum of sizes]."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
