"""Examples of supervised tasks: made once from the rows of a source, kept in files, and placed into rows of a batch.

Short ones share a row, as documents of pretraining do, so that nothing is padded but the ends of rows; which tokens see
each other says the document mask.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.cache import FORMAT, Cache, cached
from llm.data.chat import template_of
from llm.data.pack import BLOCK, placed
from llm.data.prepare import Held
from llm.data.source import DataError, Source, digest
from llm.data.supervised import BadRowError, Example, Supervised, examples
from llm.data.task import Widths
from llm.tokenizer import Tokenizer

_AT_ONCE = 1024  # rows whose texts are encoded in one call, on all cores
_log = logging.getLogger(__name__)


@dataclass
class ExampleRows:
    """One split of one source as a task shows it. Picklable: a process that receives it maps the files anew."""

    cache: Cache
    task: Supervised
    widths: Widths

    def __len__(self) -> int:
        n_rows: int = self.cache.meta["rows"]
        return n_rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("cache", "task", "widths")}

    @property
    def tokens_cache(self) -> Cache:
        """Where it says what text there is."""
        return self.cache

    @property
    def rows_cache(self) -> Cache:
        """Where it says what rows there are."""
        return self.cache

    def examples(self, row: int) -> list[Example]:
        """The examples that share a row."""
        first = int(self._ends[row - 1]) if row else 0
        return [self.example(int(index)) for index in self._order[first : int(self._ends[row])]]

    def example(self, index: int) -> Example:
        """An example by its number in the split."""
        whole = {name: int(self._files[f"whole_{name}"][index]) for name in self.task.whole_fields}
        return Example(
            self._side("row", self.task.fields, index), self._side("target", self.task.target_fields, index), whole
        )

    def pieces(self, row: int) -> Iterator[np.ndarray]:
        """The tokens of each example of a row, and of its target."""
        for example in self.examples(row):
            yield example.row["tokens"]
            if example.target:
                yield example.target["labels"]

    def documents(self) -> Iterator[np.ndarray]:
        """None: examples are no running text."""
        return iter(())

    def _side(self, side: str, names: tuple[str, ...], index: int) -> dict[str, np.ndarray]:
        if not names:
            return {}
        ends = self._files[f"{side}_ends"]
        piece = slice(int(ends[index - 1]) if index else 0, int(ends[index]))
        return {name: self._files[f"{side}_{name}"][piece].astype(np.int64) for name in names}

    @property
    def _order(self) -> np.ndarray:
        return self._files["order"]

    @property
    def _ends(self) -> np.ndarray:
        return self._files["ends"]

    @cached_property
    def _files(self) -> dict[str, np.ndarray]:
        found = {}
        for name in self.cache.meta["files"]:
            path = self.cache.path / name
            stem = path.stem
            dtype = "int32" if stem.startswith(("row_", "target_")) and not stem.endswith("_ends") else "int64"
            found[stem] = np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
        return found


@dataclass(frozen=True)
class ExampleTexts(Source):
    """The texts of examples, those of a row together, for a tokenizer to be trained on: one document for each row, as
    every `val_every`-th row is held out."""

    source: Source
    tasks: list[Supervised]

    @property
    def weight(self) -> float:  # type: ignore[override]
        return self.source.weight

    def documents(self) -> Iterator[str]:
        for row, where in self.source.rows():
            texts = []
            for task in self.tasks:
                with suppress(BadRowError):  # of which the task tells, or which it counts
                    texts += task.read(row, where).texts
            yield "\n".join(texts) or "\n"

    def fingerprint(self) -> str:
        return digest("examples", self.source.fingerprint(), repr(self.tasks))

    def validation(self) -> Source | None:
        return self.source.validation()


def prepare_examples(
    name: str, source: Source, task: Supervised, tokenizer: Tokenizer, held: Held, widths: Widths, root: Path
) -> ExampleRows:
    """The examples that `task` makes of the rows of one split of `source`.

    Raises DataError if there is none, or, unless the task skips them, for the first row that cannot be one.
    """
    template = template_of(tokenizer)
    key = digest(
        FORMAT, source.fingerprint(), tokenizer.fingerprint, template, held, widths, type(task).__name__, repr(task)
    )

    def build(folder: Path) -> dict[str, Any]:
        writer = _Writer(folder, task)
        with writer:
            for example in _examples(source, task, tokenizer, held, widths, writer.skipped):
                writer.add(example)
        if writer.n_examples == 0:
            raise DataError(f"data source {name!r}: no row is an example ({writer.said()}); check its columns")
        if writer.skipped:
            _log.warning("%s: rows left out: %s", name, writer.said())
        return {"source": name, "held": asdict(held), **writer.placed(widths)}

    return ExampleRows(cached(root, "examples", key, build), task, widths)


def _examples(
    source: Source, task: Supervised, tokenizer: Tokenizer, held: Held, widths: Widths, skipped: Counter[str]
) -> Iterator[Example]:
    """In the order of the source; what is no example is counted by its rule."""
    rows = ((row, where) for number, (row, where) in enumerate(source.rows()) if held.has(number))
    kept = examples(task, rows, skipped)
    while read := [one for one, _ in islice(kept, _AT_ONCE)]:
        encoded = iter(task.encode([text for one in read for text in one.texts], tokenizer))
        for one in read:
            made = task.examples(one, [next(encoded) for _ in one.texts], widths, tokenizer)
            if isinstance(made, str):
                skipped[made] += 1
            else:
                yield from made


class _Writer:
    """Examples into files: `row_NAME`, `target_NAME` (int32), where each ends, and `whole_NAME` (int64)."""

    def __init__(self, folder: Path, task: Supervised) -> None:
        self._folder, self._task = folder, task
        self._stack = ExitStack()
        self._digest = hashlib.sha256()
        self._lengths: dict[str, list[int]] = {"row": [], "target": []}
        self.skipped: Counter[str] = Counter()
        self.n_cut = 0

    @property
    def n_examples(self) -> int:
        return len(self._lengths["row"])

    def said(self) -> str:
        """What was left out, and why."""
        return ", ".join(f"{n:,} where {rule}" for rule, n in self.skipped.most_common()) or "there is none"

    def __enter__(self) -> _Writer:
        names = [f"row_{name}" for name in self._task.fields] + [f"target_{name}" for name in self._task.target_fields]
        names += [f"whole_{name}" for name in self._task.whole_fields]
        self._open = {name: self._stack.enter_context((self._folder / f"{name}.bin").open("wb")) for name in names}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, example: Example) -> None:
        """Append one."""
        for side, fields in (("row", example.row), ("target", example.target)):
            for name, values in fields.items():
                self._write(f"{side}_{name}", values.astype(np.int32))
            self._lengths[side].append(len(next(iter(fields.values()), ())))
        for name, value in example.whole.items():
            self._write(f"whole_{name}", np.int64(value))
        self.n_cut += example.cut

    def placed(self, widths: Widths) -> dict[str, Any]:
        """Say which examples share a row, and what it came to."""
        rows, targets = (np.array(self._lengths[side], np.int64) for side in ("row", "target"))
        costs = np.maximum(rows, -(-targets * widths.row // widths.target)) if targets.any() else rows
        order, ends, n_before = [], [], 0
        for first in range(0, len(costs), BLOCK):
            block = costs[first : first + BLOCK]
            alone = np.arange(len(block))
            which, ending = (alone, alone + 1) if self._task.alone else placed(block, widths.row)
            order.append(which + first)
            ends.append(ending + n_before)
            n_before += len(block)
        sides = {"row_ends": np.cumsum(rows)} | ({"target_ends": np.cumsum(targets)} if targets.any() else {})
        for name, values in {"order": np.concatenate(order), "ends": np.concatenate(ends), **sides}.items():
            values.astype(np.int64).tofile(self._folder / f"{name}.bin")
        n_rows, n_used, n_target = sum(map(len, ends)), int(rows.sum()), int(targets.sum())
        fill = {"fill": n_used / (n_rows * widths.row)}
        fill |= {"target_fill": n_target / (n_rows * widths.target)} if n_target else {}
        return {
            "documents": len(rows),
            "empty": sum(self.skipped.values()),
            "skipped": dict(self.skipped),
            "tokens": n_used + n_target,
            "bytes": 0,
            "content": self._digest.hexdigest()[:16],
            "inputs": n_used + n_target,
            "rows": n_rows,
            "cut": self.n_cut,
            "pairs": 0,
            **fill,
        }

    def _write(self, name: str, values: Any) -> None:
        raw = values.tobytes()
        self._open[name].write(raw)
        self._digest.update(raw)
