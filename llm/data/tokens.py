"""Token files: the documents of a source as tokens, one after the other. Whoever makes them, all of it or a share, or
puts shares together, writes with one `TokenWriter`."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.cache import FORMAT
from llm.data.encode import encoded, joined
from llm.data.source import DataError, Source, digest
from llm.tokenizer import Tokenizer

_REPORT_S = 10  # between two lines that say how far it is
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """What token files are made of: the documents of the source `name`, and the tokenizer; with `words` the files say
    where words begin."""

    name: str
    source: Source
    tokenizer: Tokenizer
    words: bool = False

    @cached_property
    def key(self) -> str:
        """Of their cache: the fingerprint of all that decides what is in them."""
        tokenizer = self.tokenizer
        return digest(FORMAT, self.source.fingerprint(), tokenizer.fingerprint, tokenizer.start_id, self.words)

    @property
    def dtype(self) -> np.dtype:
        """Of a token, as stored."""
        return np.dtype("uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32")

    def check(self, n_documents: int, n_empty: int) -> None:
        """Raises DataError unless there are documents with text; `n_empty` counts those without."""
        if n_documents == 0:
            found = f"only {n_empty} empty ones" if n_empty else "none"
            raise DataError(f"data source {self.name!r} has no documents ({found}); check its files and its column")


class TokenWriter:
    """Appends to tokens.bin (uint16 or uint32), documents.bin (int64, where each document begins, and the end) and
    words.bin (bool, where a word begins; empty if nobody asks), and counts and hashes what it writes."""

    def __init__(self, text: Text, files: list[BufferedWriter]) -> None:
        self.n_documents = self.n_tokens = 0
        self.n_empty = self.n_bytes = 0  # for who writes to count: documents without text, and bytes of text
        self._text = text
        self._tokens, self._documents, self._words = files
        self._tokens_digest, self._documents_digest = hashlib.sha256(), hashlib.sha256()
        self._started = self._reported = time.monotonic()

    def begin(self, starts: np.ndarray) -> None:
        """Documents begin in what is added next, `starts` (int64) tokens after the last one so far."""
        starts = self.n_tokens + starts
        self._documents.write(starts.data)
        self._documents_digest.update(starts.data)
        self.n_documents += len(starts)

    def add(self, tokens: np.ndarray, words: np.ndarray | None) -> None:
        """Tokens of documents that have begun, and beside them (bool) where words begin."""
        self._tokens.write(tokens.data)
        self._tokens_digest.update(tokens.data)
        self.n_tokens += len(tokens)
        if words is not None:
            self._words.write(words.data)

    def say(self) -> None:
        """Log how far it is, every now and then."""
        now = time.monotonic()
        if now - self._reported > _REPORT_S:
            self._reported = now
            gigabytes, speed = self.n_bytes / 1e9, self.n_bytes / 1e6 / (now - self._started)
            line = "%s: %d documents, %.2f GB tokenised, %.1f MB/s"
            _log.info(line, self._text.name, self.n_documents, gigabytes, speed)

    def finished(self) -> dict[str, Any]:
        """Write where the last document ends; returns what all came to."""
        self._documents.write(np.int64(self.n_tokens).data)
        return {
            "source": self._text.name,
            "dtype": self._text.dtype.name,
            "documents": self.n_documents,
            "empty": self.n_empty,
            "tokens": self.n_tokens - 2 * self.n_documents,
            "bytes": self.n_bytes,
            "words": self._text.words,
            "content": digest(self._tokens_digest.hexdigest(), self._documents_digest.hexdigest()),
            "seconds": round(time.monotonic() - self._started, 2),
        }


@contextmanager
def token_files(folder: Path, text: Text) -> Iterator[TokenWriter]:
    """Begin the token files of `text`, or of a part of it, in `folder`."""
    with binaries(folder, "tokens", "documents", "words") as files:
        yield TokenWriter(text, files)


@contextmanager
def binaries(folder: Path, *names: str) -> Iterator[list[BufferedWriter]]:
    """FOLDER/NAME.bin for each name, to write to."""
    with ExitStack() as stack:
        yield [stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names]


def tokenised(folder: Path, text: Text) -> dict[str, Any]:
    """Make the token files of all documents; returns what they came to. Raises DataError."""
    meta = tokenise(folder, text, text.source.documents())
    text.check(meta["documents"], meta["empty"])
    return meta


def tokenise(folder: Path, text: Text, documents: Iterable[str]) -> dict[str, Any]:
    """Make the token files of `documents`, which are some of `text`; returns what they came to."""
    tokenizer = text.tokenizer
    with token_files(folder, text) as writer:
        for chunk, ids, starts in encoded(iter(documents), tokenizer, text.words):
            tokens, sizes = joined(chunk, ids, tokenizer.start_id, tokenizer.eot_id, text.dtype)
            words = joined(chunk, starts, 1, 1, np.dtype("bool"))[0] if text.words else None
            writer.begin((np.cumsum(sizes) - sizes)[chunk.opens])
            writer.add(tokens, words)
            writer.n_empty += chunk.n_empty
            writer.n_bytes += sum(len(part) if part.isascii() else len(part.encode()) for part in chunk.parts)
            writer.say()
        return writer.finished()
