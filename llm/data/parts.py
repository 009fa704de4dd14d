"""Sources x tasks: what a run's data is made of, prepared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llm.data.cache import caches, staged
from llm.data.examples import ExampleRows, ExampleTexts, prepare_examples
from llm.data.prepare import Held, Recipe, Rows, prepare_rows, prepare_tokenizer, prepare_tokens
from llm.data.share import Share, are_there, prepare_share
from llm.data.source import DataError, Source
from llm.data.supervised import Supervised
from llm.data.task import Task, Widths
from llm.data.tokens import Text
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
AnyRows = Rows | ExampleRows


class Part(NamedTuple):
    """One source as one task shows it: what a row of a mixture is drawn from."""

    source: str
    task: str


@dataclass(frozen=True)
class Prepared:
    """What preparation leaves behind: everything but the tokenizer is files."""

    tokenizer: Tokenizer
    train: dict[Part, AnyRows]
    val: dict[Part, AnyRows]

    def stage(self, source: Path, target: Path) -> None:
        """Copy what is read, and the tokenizers of `source`, from one cache directory to another."""
        rows = [*self.train.values(), *self.val.values()]
        used = {cache.path: cache for one in rows for cache in (one.tokens_cache, one.rows_cache)}
        for cache in [*(cache for cache in caches(source) if cache.kind == "tokenizer"), *used.values()]:
            staged(cache, target)


@dataclass(frozen=True)
class Plan:
    """What is to be prepared; as TextData has it."""

    sources: Mapping[str, Source]
    tasks: Mapping[str, Task]
    widths: Widths
    val_every: int | None
    seed: int
    cache_dir: Path

    def prepared(self, recipe: Recipe) -> Prepared:
        """Make it, or find it. Raises DataError."""
        prepared = Prepared(self._tokenizer(recipe), {}, {})
        for name, source in self.sources.items():
            self._prepare_text(name, source, prepared)
            self._prepare_examples(name, source, prepared)
        return prepared

    def share(self, recipe: Recipe, number: int, of: int) -> bool:
        """Make one share of each token file, or find it; returns whether all shares of all of them are there now.
        Raises DataError, and ValueError for a share that there cannot be."""
        share = Share(number, of)
        texts = list(self._running_texts(self._tokenizer(recipe)))
        for text in texts:
            prepare_share(text, share, self.cache_dir)
        # Only now, with all of its own made: so the last of several tasks sees those of the others, whoever that is.
        return all(are_there(text, of, self.cache_dir) for text in texts)

    def _tokenizer(self, recipe: Recipe) -> Tokenizer:
        """Make it, or find it, and check that it does for the tasks."""
        tokenizer = prepare_tokenizer(recipe, self._texts, self.val_every, self.cache_dir)
        for name, task in self.tasks.items():
            task.check(name, tokenizer)
            task.check_row(name, self.widths, tokenizer)
        return tokenizer

    def _running_texts(self, tokenizer: Tokenizer) -> Iterator[Text]:
        """What `_prepare_text` has made into token files."""
        for name, source in self.sources.items() if self._text_tasks else ():
            for one in (source, source.validation()):
                if one is not None:
                    yield Text(name, one, tokenizer, self._words)

    @property
    def _text_tasks(self) -> dict[str, Task]:
        """Tasks that make something of running text."""
        return {name: task for name, task in self.tasks.items() if not isinstance(task, Supervised)}

    @property
    def _words(self) -> bool:
        """Whether token files say where words begin."""
        return any(task.needs_words for task in self._text_tasks.values())

    @property
    def _texts(self) -> Mapping[str, Source]:
        """What a tokenizer is trained on."""
        tasks = [task for task in self.tasks.values() if isinstance(task, Supervised)]
        return {name: ExampleTexts(source, tasks) for name, source in self.sources.items()} if tasks else self.sources

    def _every(self, source: Source) -> int | None:
        """Every how many documents of a source are held out; None: none, or the source has validation of its own."""
        return self.val_every if source.validation() is None else None

    def _prepare_text(self, name: str, source: Source, prepared: Prepared) -> None:
        """The rows of tasks that make something of running text."""
        if not self._text_tasks:
            return
        how = (prepared.tokenizer, self.cache_dir, self._words)
        tokens = prepare_tokens(name, source, *how)
        own, every = source.validation(), self._every(source)
        held = None if own is None else (prepare_tokens(name, own, *how), Held())
        if every is not None:
            if tokens.meta["documents"] < every:
                raise DataError(_too_few(name, tokens.meta["documents"], every))
            held = tokens, Held(every, out=True)
        for task_name, task in self._text_tasks.items():
            part, layout = Part(name, task_name), (task, self.widths)
            train = prepare_rows(name, tokens, Held(every), layout, self.cache_dir, self.seed)
            if not len(train):
                raise DataError(f"data source {name!r}: no document has enough tokens for data.tasks.{task_name}")
            prepared.train[part] = train
            rows = None if held is None else prepare_rows(name, *held, layout, self.cache_dir, self.seed)
            if rows is not None and len(rows):
                prepared.val[part] = rows
            elif rows is not None:
                _log.warning("%s: no held-out document has enough tokens for data.tasks.%s", name, task_name)

    def _prepare_examples(self, name: str, source: Source, prepared: Prepared) -> None:
        """The rows of tasks whose examples are rows of a data set."""
        own, every = source.validation(), self._every(source)
        for task_name, task in self.tasks.items():
            if not isinstance(task, Supervised):
                continue
            part, layout = Part(name, task_name), (task, prepared.tokenizer)
            train = prepare_examples(name, source, *layout, Held(every), self.widths, self.cache_dir)
            prepared.train[part] = train
            n_examples = train.cache.meta["documents"]
            if every is not None and n_examples < every - 1:
                raise DataError(_too_few(name, n_examples, every))
            if own is not None or every is not None:
                held = Held(every, out=every is not None)
                prepared.val[part] = prepare_examples(name, own or source, *layout, held, self.widths, self.cache_dir)


def _too_few(name: str, n_documents: int, val_every: int) -> str:
    if n_documents < 2:
        return (
            f"data source {name!r} is one document, so none can be held out; read the paragraphs of a text file with "
            "data=text data.sources.text.path=FILE, name a val_path, or set data.val_every=null"
        )
    return (
        f"data source {name!r} has {n_documents} documents, and every {val_every}th is held out: none for validation; "
        f"set data.val_every to at most {n_documents}, or null"
    )
