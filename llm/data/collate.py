"""Rows of prepared tokens -> the batches that an objective sees. B rows, T positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from llm.data.example import (
    IGNORED,
    Fields,
    Symbols,
    cut_spans,
    enclosed,
    fill_in_the_middle,
    generator,
    hide,
    laid_out,
)
from llm.data.examples import ExampleRows
from llm.data.prepare import Rows
from llm.data.task import FillInTheMiddle, Masking, NextToken, SpanDenoising

Batch = dict[str, Tensor]


@dataclass
class Step:
    """This process's share of one optimizer step: `index` counts steps from 0, `n_tokens` what is no padding, on both
    sides of an encoder-decoder; of each micro-batch `counts` what is predicted, which the objective says."""

    index: int
    micro_batches: list[Batch]
    n_tokens: int
    counts: list[dict[str, int]] = field(default_factory=list)

    def pin_memory(self) -> Step:
        """Called by the DataLoader, which knows dicts and lists but not this class."""
        pinned = [{name: value.pin_memory() for name, value in batch.items()} for batch in self.micro_batches]
        return replace(self, micro_batches=pinned)

    def to(self, device: torch.device, non_blocking: bool = True) -> Step:
        """Lightning's way to move a batch; from page-locked memory the host does not wait for it."""
        if device.type == "cpu":
            return self
        moved = [
            {name: value.to(device, non_blocking=non_blocking) for name, value in batch.items()}
            for batch in self.micro_batches
        ]
        return replace(self, micro_batches=moved)


def assemble(rows: Rows, chosen: np.ndarray, document_mask: bool, pad_id: int) -> dict[str, np.ndarray]:
    """Rows `chosen` of one source as tokens, labels, documents, positions, all int64 [B, T]; -1 gives an empty row."""
    length = rows.widths.row
    n_rows = len(chosen)
    empty = chosen < 0
    first = np.where(chosen > 0, rows.ends[np.maximum(chosen - 1, 0)], 0)
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
    # A label is the next token, which is the batch's own but at the end of a piece: one gather less of every token.
    labels = np.append(tokens[1:], 0)
    last = np.cumsum(lengths)[lengths > 0] - 1
    labels[last] = rows.tokens.take(where[last] + 1, mode="clip")
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


@dataclass(frozen=True)
class Settings:
    """What decides, beside the rows, how a batch looks.

    document_mask  documents of one row do not see each other
    ragged         fields with some values for each row, not one for each position: every batch has them, as long as
                   its longest row's, if any of the tasks does
    documents      batches have `documents` and `positions`; else rows are one document, from its beginning
    """

    symbols: Symbols
    document_mask: bool
    seed: int
    ragged: tuple[str, ...] = ()
    documents: bool = True


def assemble_mixture(
    parts: Sequence[Rows | ExampleRows], part: np.ndarray, chosen: np.ndarray, epoch: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Row i being row chosen[i] of `parts[part[i]]` in its epoch[i]; adds samples (int64 [B]), counted over
    all parts."""
    offsets = np.cumsum([0, *map(len, parts)])[:-1]
    samples = {"samples": np.where(chosen < 0, -1, chosen + offsets[part])}
    groups = [(mine, index) for index in range(len(parts)) if len(mine := np.flatnonzero(part == index))]
    made = [_assembled(parts[index], index, chosen[mine], epoch[mine], settings) for mine, index in groups]
    for name in settings.ragged:
        width = max(arrays[name].shape[1] for arrays in made)
        for arrays in made:
            room = ((0, 0), (0, width - arrays[name].shape[1]))
            arrays[name] = np.pad(arrays[name], room, constant_values=_filler(name))
    if len(made) == 1:
        return made[0] | samples
    back = np.argsort(np.concatenate([mine for mine, _ in groups]))
    return {name: np.concatenate([arrays[name] for arrays in made])[back] for name in made[0]} | samples


def _assembled(
    rows: Rows | ExampleRows, part: int, chosen: np.ndarray, epoch: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Rows of one part, as their task shows them."""
    if isinstance(rows, ExampleRows):
        return _stacked([_example_row(rows, row, settings) for row in chosen.tolist()], settings)
    if isinstance(rows.task, NextToken):
        return assemble(rows, chosen, settings.document_mask, settings.symbols.pad)
    made = []
    for row, turn in zip(chosen.tolist(), epoch.tolist(), strict=True):
        first = int(rows.ends[row - 1]) if row > 0 else 0
        pieces = range(first, int(rows.ends[row])) if row >= 0 else range(0)
        draw = generator(settings.seed, part, turn, max(row, 0))
        made.append(_ROW[type(rows.task)](rows, pieces, draw, settings))
    return _stacked(made, settings)


def _stacked(made: list[Fields], settings: Settings) -> Fields:
    """Rows one below the other."""
    for name in settings.ragged:
        width = max(1, *(len(fields[name]) for fields in made))
        for fields in made:
            room = (0, width - len(fields[name]))
            fields[name] = np.pad(fields[name], room, constant_values=_filler(name))
    return {name: np.stack([fields[name] for fields in made]) for name in made[0]}


def _filler(name: str) -> int:
    """What stands where a row has no value: of places the first, of labels none."""
    return 0 if name == "cls_at" else IGNORED


def _example_row(rows: ExampleRows, row: int, settings: Settings) -> Fields:
    """The examples of a row one after the other; where they have a target, those in a row beside it."""
    task = rows.task
    shown = rows.examples(row) if row >= 0 else []
    padding = {"tokens": settings.symbols.pad, "labels": IGNORED, "segments": 0}
    sides = [(rows.widths.row, task.fields, [example.row for example in shown])]
    if task.target_fields:
        sides.append((rows.widths.target, task.target_fields, [example.target for example in shown]))
    laid = [
        laid_out(pieces, width, {name: padding[name] for name in names}, settings.document_mask)
        for width, names, pieces in sides
    ]
    prefixes = task.prefixes if task.target_fields else ("",)
    sided = zip(prefixes, laid, strict=True)
    fields = {f"{prefix}{name}": values for prefix, side in sided for name, values in side.items()}
    if task.whole_fields:
        sizes = np.array([len(example.row["tokens"]) for example in shown], np.int64)
        fields["cls_at"] = np.cumsum(sizes) - sizes
        fields |= {name: np.array([example.whole[name] for example in shown], np.int64) for name in task.whole_fields}
    return fields


def _middle_row(rows: Rows, pieces: range, draw: np.random.Generator, settings: Settings) -> Fields:
    """A decoder's row of documents, some with the middle last."""
    assert isinstance(rows.task, FillInTheMiddle)
    shown = [
        fill_in_the_middle(
            _stored(rows.tokens, rows.starts[piece], rows.lengths[piece] + 1), rows.task, settings.symbols, draw
        )
        for piece in pieces
    ]
    return laid_out(shown, rows.widths.row, {"tokens": settings.symbols.pad, "labels": IGNORED}, settings.document_mask)


def _masked_row(rows: Rows, pieces: range, draw: np.random.Generator, settings: Settings) -> Fields:
    """An encoder's row of pieces or pairs, with tokens hidden."""
    task, symbols = rows.task, settings.symbols
    assert isinstance(task, Masking)
    shown, labels = [], []
    for piece in pieces:
        spans = [(int(rows.starts[piece]), int(rows.lengths[piece]))]
        if rows.has_pairs:
            second, n_second, label = rows.second
            spans.append((int(second[piece]), int(n_second[piece])))
            labels.append(int(label[piece]))
        text = np.concatenate([_stored(rows.tokens, *span) for span in spans])
        words = None
        if rows.words is not None and task.whole_word:
            words = np.concatenate([_begun(rows.words[start : start + length]) for start, length in spans])
        hidden = hide(text, words, task, symbols, draw)
        cut = spans[0][1]
        halves = [{name: values[:cut] for name, values in hidden.items()}]
        if rows.has_pairs:
            halves.append({name: values[cut:] for name, values in hidden.items()})
        found = enclosed([half["tokens"] for half in halves], symbols.cls, symbols.sep)
        found["labels"] = enclosed([half["labels"] for half in halves], IGNORED, IGNORED)["tokens"]
        shown.append(found)
    padding = {"tokens": symbols.pad, "labels": IGNORED, "segments": 0}
    row = laid_out(shown, rows.widths.row, padding, settings.document_mask)
    if settings.ragged:
        sizes = np.array([len(piece["tokens"]) for piece in shown], np.int64)
        row["cls_at"] = np.cumsum(sizes) - sizes
        row["pair_labels"] = np.array(labels or [IGNORED] * len(shown), np.int64)
    return row


def _span_row(rows: Rows, pieces: range, draw: np.random.Generator, settings: Settings) -> Fields:
    """An encoder-decoder's row of sources, and the row of their targets."""
    task, symbols = rows.task, settings.symbols
    assert isinstance(task, SpanDenoising)
    sources, targets = [], []
    for piece in pieces:
        text = _stored(rows.tokens, rows.starts[piece], rows.lengths[piece])
        source, target = cut_spans(text, task, symbols, draw)
        sources.append({"tokens": source})
        targets.append({"tokens": np.concatenate([[symbols.pad], target[:-1]]), "labels": target})
    source_row = laid_out(sources, rows.widths.row, {"tokens": symbols.pad}, settings.document_mask)
    padding = {"tokens": symbols.pad, "labels": IGNORED}
    target_row = laid_out(targets, rows.widths.target, padding, settings.document_mask)
    return target_row | {f"source_{name}": values for name, values in source_row.items()}


_ROW: dict[type, Callable[[Rows, range, np.random.Generator, Settings], Fields]] = {
    FillInTheMiddle: _middle_row,
    Masking: _masked_row,
    SpanDenoising: _span_row,
}


def _stored(tokens: np.ndarray, start: int, length: int) -> np.ndarray:
    return tokens[start : start + length].astype(np.int64)


def _begun(words: np.ndarray) -> np.ndarray:
    """Where words begin in a piece, which may itself begin in the middle of one: what is there of it is a word."""
    words = words.copy()
    words[:1] = True
    return words


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def to_step(index: int, arrays: dict[str, np.ndarray], micro_batch_size: int, *, documents: bool = True) -> Step:
    """Rows as micro-batches, and how many tokens they are: counted while they are on the host. Without `documents`
    they leave out what they would say of those."""
    sides = [array for name, array in arrays.items() if name.endswith("documents")]
    n_tokens = sum(int(np.count_nonzero(documents)) for documents in sides)  # 0 marks padding
    if not documents:
        arrays = {name: array for name, array in arrays.items() if name not in ("documents", "positions")}
    return Step(index, split(to_batch(arrays), micro_batch_size), n_tokens)


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
