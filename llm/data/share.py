"""Token files by the tasks of an array: each makes a share, and the shares make the files that one process would make.

Documents are dealt out in blocks of so many in a row, block b to share b % n. Every task reads the whole source, which
is many times faster than tokenising it, and so knows without a word to the others which blocks are its own. To put the
shares together is to take a block from each in turn.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.cache import Cache, OvertakenError, cached, find, remove_caches
from llm.data.source import digest
from llm.data.tokens import Text, TokenWriter, token_files, tokenise

# Documents in a row that are of one share, empty ones included: few enough to deal out evenly, enough to copy at once.
_BLOCK = 1024
_AT_ONCE = 1 << 22  # tokens that are copied at once, however long a document is
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Share `number`, counted from 0, of `of`. Raises ValueError where there can be none."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            rule = "the first number counts from 0 and must be below the second, how many there are"
            raise ValueError(f"share {self}: {rule}; of 4 shares, 0/4 1/4 2/4 3/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def find(self, text: Text, root: Path) -> Cache | None:
        """This share of the token files of `text`, if it is there and intact."""
        return find(root, "share", self.key(text))

    def key(self, text: Text) -> str:
        """Of the cache that holds it: a name that also tells people which share it is."""
        return f"{text.key}-{self.number}of{self.of}"


def prepare_share(text: Text, share: Share, root: Path) -> None:
    """Make one share of the token files of `text`, unless it or the files themselves are there. Raises DataError."""
    if find(root, "tokens", text.key) is None:
        cached(root, "share", share.key(text), lambda folder: _tokenised(folder, text, share))


def are_there(text: Text, of: int, root: Path) -> bool:
    """Whether the token files need no more tokenising: all `of` shares are there, or the files themselves."""
    shares = (Share(number, of).find(text, root) for number in range(of))
    # In this order: shares are removed once the files stand.
    return all(share is not None for share in shares) or find(root, "tokens", text.key) is not None


def merged(folder: Path, text: Text, root: Path) -> dict[str, Any] | None:
    """Make the token files of `text` of its shares; returns what they came to, None where shares do not make them up.

    Raises OvertakenError where another process was faster.
    """
    reason = None
    try:
        shares = _array(text, root)
        if shares:
            return _merge(folder, text, shares)
    except _UnusableError as error:
        reason = error
    if find(root, "tokens", text.key) is not None:
        raise OvertakenError  # which is why the shares are gone
    if reason is not None:
        _log.warning("%s: %s; tokenising all of the text here", text.name, reason)
    return None


def remove_shares(text: Text, root: Path) -> None:
    """Delete what is there of the shares of `text`, as its token files stand."""
    try:
        remove_caches(root, f"share-{text.key}-*")
    except OSError as error:
        _log.warning("%s: its shares stay, as they cannot be removed (%s)", text.name, error)


class _UnusableError(Exception):
    """Says why shares cannot be put together."""


class _Dealt:
    """The documents of one share, and what was seen on the way of all documents."""

    def __init__(self, text: Text, share: Share) -> None:
        self.n_documents = self.n_empty = 0  # of all documents: those with text, and those without
        self.filled: list[int] = []  # of each block of the share, how many documents have text
        self._text, self._share = text, share
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(self._text.source.documents()):
            block, place = divmod(number, _BLOCK)
            raw = document.encode()
            self._digest.update(b"%d:" % len(raw))
            self._digest.update(raw)
            self.n_documents += bool(raw)
            self.n_empty += not raw
            if block % self._share.of == self._share.number:
                if place == 0:
                    self.filled.append(0)
                self.filled[-1] += bool(raw)
                yield document

    @property
    def read(self) -> str:
        """The fingerprint of all documents, as they were read and dealt out: the same for all shares of one text."""
        return digest(_BLOCK, self._digest.hexdigest())


def _tokenised(folder: Path, text: Text, share: Share) -> dict[str, Any]:
    """Make the token files of one share, and blocks.bin (int64, of each block how many documents have text)."""
    dealt = _Dealt(text, share)
    meta = tokenise(folder, text, dealt)
    text.check(dealt.n_documents, dealt.n_empty)
    np.array(dealt.filled, np.int64).tofile(folder / "blocks.bin")
    return meta | {"share": str(share), "read": dealt.read}


def _array(text: Text, root: Path) -> list[Cache]:
    """The shares that make up the token files, by their number; none if there are no shares at all.

    Raises _UnusableError if some are missing or damaged.
    """
    named = (re.fullmatch(rf"share-{text.key}-\d+of(\d+)", path.name) for path in root.glob(f"share-{text.key}-*"))
    reasons = []
    for of in sorted({int(match[1]) for match in named if match}):
        shares = {share: share.find(text, root) for share in (Share(number, of) for number in range(of))}
        found = [cache for cache in shares.values() if cache is not None]
        if len(found) == of:
            return found
        lacking = [str(share) for share, cache in shares.items() if cache is None]
        listed = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        reasons.append(f"of its {of} shares {len(lacking)} are missing or damaged ({listed})")
    if reasons:
        raise _UnusableError("; ".join(reasons))
    return []


def _merge(folder: Path, text: Text, shares: list[Cache]) -> dict[str, Any]:
    """Put shares together. Raises _UnusableError if they do not fit, or vanish while they are read."""
    if len({share.meta["read"] for share in shares}) > 1:
        raise _UnusableError(f"its {len(shares)} shares were made of different texts, as the source has changed")
    with token_files(folder, text) as writer:
        for turn in cycle([_blocks(share, writer) for share in shares]):
            if next(turn, None) is None:  # the next block would be of this share: then there is no other
                break
        writer.n_empty = sum(share.meta["empty"] for share in shares)
        writer.n_bytes = sum(share.meta["bytes"] for share in shares)
        meta = writer.finished()
    if any(meta[name] != sum(share.meta[name] for share in shares) for name in ("documents", "tokens")):
        raise _UnusableError(f"its {len(shares)} shares do not fit together")
    return meta


def _blocks(share: Cache, writer: TokenWriter) -> Iterator[int]:
    """Append the blocks of a share to `writer`, one at each step; yields how many documents it had."""
    first = 0
    for n_documents in _items(share, "blocks.bin", "int64").tolist():
        bounds = _items(share, "documents.bin", "int64", first, n_documents + 1)
        writer.begin(bounds[:-1] - bounds[0])
        for start in range(int(bounds[0]), int(bounds[-1]), _AT_ONCE):
            which = start, min(_AT_ONCE, int(bounds[-1]) - start)
            words = _items(share, "words.bin", "bool", *which) if share.meta["words"] else None
            writer.add(_items(share, "tokens.bin", share.meta["dtype"], *which), words)
        first += n_documents
        yield n_documents


def _items(share: Cache, name: str, dtype: str, first: int = 0, count: int = -1) -> np.ndarray:
    """`count` items of a file from `first` on; -1: all the rest. Opens it each time, as an array may be large and the
    files of a process are few; and reads, as what is mapped must not vanish. Raises _UnusableError."""
    try:
        found = np.fromfile(share.path / name, dtype, count, offset=first * np.dtype(dtype).itemsize)
    except OSError as error:
        raise _UnusableError(f"{share.path / name}: {error.strerror or error}") from None
    if count not in (-1, len(found)):
        raise _UnusableError(f"{share.path / name}: cut off")
    return found
