"""Text -> tokenizer -> token files -> rows: each made once, kept under a fingerprint of its origin, and memory-mapped.

A document is stored as start + tokens + end-of-text, and most tokenizers start with end-of-text too. So one of n tokens
has n + 1 inputs and n + 1 labels, and cutting it anywhere loses no prediction: the label of one piece's last input is
the first input of the next.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from llm.data.cache import FORMAT, Cache, cached
from llm.data.pack import BLOCK, pack, placed
from llm.data.pair import draw_pairs
from llm.data.share import merged, remove_shares
from llm.data.source import DataError, Source, digest
from llm.data.task import Masking, Task, Widths
from llm.data.tokens import Text, binaries, tokenised
from llm.tokenizer import Tokenizer

# What the tokenizer is trained on, in characters: BPE merges of a few thousand entries are settled long before.
_SAMPLE = 10_000_000
# How far into each source the sample reaches.
_SAMPLE_REACH = 1 << 30


class Recipe(Protocol):
    """What `conf/tokenizer` builds: a frozen dataclass of llm.tokenizer."""

    needs_text: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int: ...

    def build(self, texts: Iterable[str]) -> Tokenizer: ...


@dataclass(frozen=True)
class Held:
    """Which documents of a token file belong to a split: every `every`-th is held out; None takes all."""

    every: int | None = None
    out: bool = False

    def count(self, n_documents: int) -> int:
        """Of so many documents."""
        if self.every is None:
            return n_documents
        out = n_documents // self.every
        return out if self.out else n_documents - out

    def has(self, number: int) -> bool:
        """Whether document `number`, counted from 0, is in this split."""
        return self.every is None or ((number + 1) % self.every == 0) == self.out

    def places(self, which: np.ndarray) -> np.ndarray:
        """Where the documents `which` of this split are among all (int64 both)."""
        if self.every is None:
            return which
        return (which + 1) * self.every - 1 if self.out else which + which // (self.every - 1)


@dataclass
class Rows:
    """One split of one source, ready to read. Picklable: a process that receives it maps the files anew."""

    tokens_cache: Cache
    rows_cache: Cache
    task: Task
    widths: Widths

    def __len__(self) -> int:
        return self.rows_cache.meta["rows"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("tokens_cache", "rows_cache", "task", "widths")}

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32: all documents of the source, one after the other."""
        return _map(self.tokens_cache, "tokens.bin", self.tokens_cache.meta["dtype"])

    @cached_property
    def starts(self) -> np.ndarray:
        return _map(self.rows_cache, "starts.bin", "int64")

    @cached_property
    def lengths(self) -> np.ndarray:
        return _map(self.rows_cache, "lengths.bin", "int32")

    @cached_property
    def ends(self) -> np.ndarray:
        return _map(self.rows_cache, "ends.bin", "int64")

    @cached_property
    def words(self) -> np.ndarray | None:
        """bool, beside `tokens`: where a word begins; None where the task does not ask for it."""
        return _map(self.tokens_cache, "words.bin", "bool") if self.tokens_cache.meta["words"] else None

    @cached_property
    def second(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of pairs: where their second parts begin, their tokens, and the labels."""
        files = {"second.bin": "int64", "second_lengths.bin": "int32", "pair_labels.bin": "int64"}
        starts, lengths, labels = (_map(self.rows_cache, name, dtype) for name, dtype in files.items())
        return starts, lengths, labels

    @property
    def has_pairs(self) -> bool:
        return self.rows_cache.meta["pairs"] > 0

    def pieces(self, row: int) -> Iterator[np.ndarray]:
        """The tokens of each piece of text in a row, as stored."""
        first = int(self.ends[row - 1]) if row else 0
        for piece in range(first, int(self.ends[row])):
            yield self.tokens[self.starts[piece] : self.starts[piece] + self.lengths[piece]]

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document of this split, without the ends of text around them."""
        for starts, lengths in _blocks(self.tokens_cache, Held(**self.rows_cache.meta["held"])):
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                yield self.tokens[start + 1 : start + length]


def prepare_tokenizer(recipe: Recipe, sources: Mapping[str, Source], val_every: int | None, root: Path) -> Tokenizer:
    """Build the tokenizer, or find the one trained before on the same text; only training documents are looked at."""
    if not recipe.needs_text:
        return recipe.build(())
    origin = [
        (source.fingerprint(), source.weight, source.validation() is None and val_every) for source in sources.values()
    ]
    key = digest(FORMAT, type(recipe).__name__, sorted(asdict(recipe).items()), origin, _SAMPLE)

    def build(folder: Path) -> dict[str, Any]:
        started = time.monotonic()
        tokenizer = recipe.build(sample(sources, val_every))
        tokenizer.save(folder)
        return {"vocab_size": tokenizer.vocab_size, "seconds": round(time.monotonic() - started, 2)}

    return Tokenizer.load(cached(root, "tokenizer", key, build).path)


def sample(sources: Mapping[str, Source], val_every: int | None, n_characters: int = _SAMPLE) -> Iterator[str]:
    """Training documents spread over the sources, their shares of the characters as their weights."""
    total = sum(source.weight for source in sources.values())
    for name, source in sources.items():
        texts = _training(source, val_every)
        yield from _thinned(texts, round(n_characters * source.weight / total), name)


def _training(source: Source, val_every: int | None) -> Iterator[str]:
    texts = (text for text in source.documents() if text)
    every = None if source.validation() is not None else val_every
    return (text for index, text in enumerate(texts, 1) if every is None or index % every)


def _thinned(texts: Iterator[str], n_characters: int, name: str) -> list[str]:
    """Every k-th text, k being the power of two that keeps them within `n_characters`; one pass, bounded memory."""
    kept: list[str] = []
    stride, size, reach = 1, 0, 0
    for index, text in enumerate(texts):
        reach += len(text)
        if reach > _SAMPLE_REACH:
            break
        if index % stride:
            continue
        kept.append(text[:n_characters])  # one huge document must not be all there is
        size += len(kept[-1])
        while size > n_characters and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(map(len, kept))
    if not kept:
        raise DataError(f"data source {name!r} has no training documents; check its files and data.val_every")
    return kept


def prepare_tokens(name: str, source: Source, tokenizer: Tokenizer, root: Path, words: bool = False) -> Cache:
    """Every document of `source` as tokens, in the files of `TokenWriter`: of shares that are there, or tokenised."""
    text = Text(name, source, tokenizer, words)
    tokens = cached(root, "tokens", text.key, lambda folder: merged(folder, text, root) or tokenised(folder, text))
    remove_shares(text, root)
    return tokens


def prepare_rows(name: str, tokens: Cache, held: Held, layout: tuple[Task, Widths], root: Path, seed: int = 0) -> Rows:
    """One split of a token file in rows: starts.bin, lengths.bin and ends.bin, as in `Packed`.

    Next-token pieces count inputs from the start of a document on, others its tokens. Pairs, drawn from
    `seed`, have further files for their second parts.
    """
    task, widths = layout
    pairs = isinstance(task, Masking) and task.next_sentence
    drawn = (task.n_copies, seed) if isinstance(task, Masking) and pairs else None
    costs = hashlib.sha256(task.cost(np.arange(1, task.longest(widths) + 1), widths).tobytes()).hexdigest()
    packing = (type(task).__name__, task.longest(widths), costs, drawn)
    key = digest(FORMAT, tokens.path.name, tokens.meta["content"], held, widths, BLOCK, packing)

    def build(folder: Path) -> dict[str, Any]:
        blocks = _blocks(tokens, held, shift=0 if task.family == "decoder" else 1)
        return {
            "source": name,
            "held": asdict(held),
            "max_length": widths.row,
            "documents": held.count(tokens.meta["documents"]),
            **(_pair_rows(folder, blocks, layout, seed) if pairs else _piece_rows(folder, blocks, layout)),
        }

    return Rows(tokens, cached(root, "rows", key, build), task, widths)


Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


def _blocks(tokens: Cache, held: Held, shift: int = 0) -> Blocks:
    """Where the inputs of each document of a split start in the token file, and how many there are (int64 both); with
    `shift` without the first. `BLOCK` documents at a time."""
    n_documents = held.count(tokens.meta["documents"])
    for first in range(0, n_documents, BLOCK):
        bounds = _map(tokens, "documents.bin", "int64")  # anew, so that what was read for the last block is let go
        places = held.places(np.arange(first, min(first + BLOCK, n_documents)))
        starts = bounds[places]
        yield starts + shift, bounds[places + 1] - starts - 1 - shift


def _piece_rows(folder: Path, blocks: Blocks, layout: tuple[Task, Widths]) -> dict[str, Any]:
    """Write documents, cut where they are too long; returns what they came to."""
    task, widths = layout
    n_rows = n_pieces = n_cut = n_used = n_target = 0
    with binaries(folder, "starts", "lengths", "ends") as (starts_file, lengths_file, ends_file):
        longest = task.longest(widths)
        rows = (pack(*block, widths.row, longest, lambda n: task.cost(n, widths)) for block in blocks)
        for block in chain.from_iterable(rows):
            starts_file.write(block.starts.data)
            lengths_file.write(block.lengths.data)
            ends_file.write((block.ends + n_pieces).data)
            used, target = task.used(block.lengths.astype(np.int64))
            n_used, n_target = n_used + used, n_target + target
            n_rows, n_pieces, n_cut = n_rows + len(block.ends), n_pieces + len(block.starts), n_cut + block.n_cut
    return _totals(n_rows, n_cut, n_used, n_target, widths)


def _pair_rows(folder: Path, documents: Blocks, layout: tuple[Task, Widths], seed: int) -> dict[str, Any]:
    """Write pairs of parts of documents, some copies of them; returns what they came to."""
    task, widths = layout
    assert isinstance(task, Masking)
    # Each block draws by itself, and has to hold a second document to draw from.
    filled = [(starts[lengths > 0], lengths[lengths > 0]) for starts, lengths in documents]
    starts, lengths = (np.concatenate(column) for column in zip(*filled, strict=True))
    if len(lengths) < 2:
        raise DataError(
            "next_sentence: the second part of a pair may come from another document, and this split of the source has "
            f"{len(lengths)} documents; read more documents, hold more out (data.val_every), or set next_sentence=false"
        )
    names = ("starts", "lengths", "ends", "second", "second_lengths", "pair_labels")
    n_rows = n_pairs = n_used = 0
    blocks = [slice(first, first + BLOCK) for first in range(0, len(starts), BLOCK)]
    blocks = blocks if len(blocks) == 1 or len(starts) % BLOCK != 1 else [*blocks[:-2], slice(blocks[-2].start, None)]
    with binaries(folder, *names) as files:
        for number, block in enumerate(block for _ in range(task.n_copies) for block in blocks):
            drawn = draw_pairs(starts[block], lengths[block], widths.row - 3, (seed, number))
            costs = drawn.n_first + drawn.n_second + 3
            order, ends = placed(costs, widths.row)
            first, second = drawn.n_first.astype(np.int32), drawn.n_second.astype(np.int32)
            columns: list[np.ndarray] = [drawn.first[order], first[order], ends + n_pairs]
            columns += [drawn.second[order], second[order], drawn.label[order]]
            for file, column in zip(files, columns, strict=True):
                file.write(column.data)
            n_rows, n_pairs, n_used = n_rows + len(ends), n_pairs + len(drawn), n_used + int(costs.sum())
    return _totals(n_rows, 0, n_used, 0, widths) | {"pairs": n_pairs}


def _totals(n_rows: int, n_cut: int, n_used: int, n_target: int, widths: Widths) -> dict[str, Any]:
    fill = {"fill": n_used / (n_rows * widths.row) if n_rows else 0.0}
    if n_target:
        fill["target_fill"] = n_target / (n_rows * widths.target)
    return {"inputs": n_used + n_target, "rows": n_rows, "cut": n_cut, "pairs": 0, **fill}


def _map(cache: Cache, name: str, dtype: str) -> np.ndarray:
    """A read-only view of a file. A plain array over the map: np.memmap costs a Python call per slice."""
    path = cache.path / name
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
