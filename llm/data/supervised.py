"""What a row of a data set becomes: an input, and what is to be made of it.

A supervised task is a config node. It names the columns that it reads, says which texts of a row are to be encoded, and
makes examples of their tokens; llm/data/examples.py keeps examples and places them into rows. The tasks are in
llm/data/writing.py and llm/data/labelling.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llm.data.example import Fields
from llm.data.source import DataError, Row
from llm.data.task import Task, Widths
from llm.tokenizer import Tokenizer

BadRows = Literal["refuse", "skip"]
# Of what an answer is made: tokens, a label of a text, a label of each token, a part of the text, one of two texts.
Answers = Literal["vocabulary", "label", "tags", "span", "preference"]


class BadRowError(DataError):
    """A row that cannot be an example; `rule` says in a few words why, and is what skipped ones are counted by."""

    def __init__(self, where: str, rule: str, remedy: str) -> None:
        super().__init__(f"{where}: {rule}; {remedy}, or set bad_rows=skip for this task")
        self.rule = rule


@dataclass(frozen=True)
class Read:
    """A row as a task has read it: texts in the order in which they are encoded, and what is no text."""

    texts: list[str]
    rest: Any = None


@dataclass(frozen=True)
class Example:
    """An input and what is to be made of it, as arrays.

    row      what goes into a row: of an encoder-decoder, what its encoder reads
    target   what goes into the row beside it: what the decoder of an encoder-decoder writes
    whole    name -> the one value of the example
    cut      whether it was longer than there is room for
    """

    row: Fields
    target: Fields = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    cut: bool = False


class Supervised(Task):
    """A task whose examples are rows of a data set, each with an answer.

    `bad_rows` says whether a row that cannot be an example ends the preparation (refuse) or is counted (skip).
    """

    bad_rows: BadRows
    fields: ClassVar[tuple[str, ...]]  # of a row
    target_fields: ClassVar[tuple[str, ...]] = ()
    whole_fields: ClassVar[tuple[str, ...]] = ()
    prefixes: ClassVar[tuple[str, str]] = ("source_", "")  # of a batch's fields for a row and its target, if it has one
    alone: ClassVar[bool] = False  # whether an example has a row for itself
    answers: ClassVar[Answers] = "vocabulary"  # what is chosen from
    metrics: ClassVar[tuple[str, ...]]  # names in llm.metric.METRICS by which it is evaluated

    @abstractmethod
    def read(self, row: Row, where: str) -> Read:
        """What is needed of a row. Raises DataError, and BadRowError for what is wrong with this row alone."""

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[Any]:
        """Each text as `examples` wants it: its tokens, int64 [n]."""
        return [tokens.astype(np.int64) for tokens in tokenizer.encode_batch(texts)]

    @abstractmethod
    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        """From each of its texts, encoded; a rule, as of BadRowError, if there is nothing to learn from it."""

    def prompt_of(self, read: Read, tokenizer: Tokenizer) -> list[int]:
        """What a trained model is given of a row, to write the rest of it."""
        raise AssertionError(f"{type(self).__name__} has nothing written")

    @abstractmethod
    def references(self, read: Read) -> list[str]:
        """What it should make: one text, or several that are as good."""

    def longest(self, widths: Widths) -> int:
        return widths.row  # examples are cut when they are made

    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        return lengths


def examples(task: Supervised, rows: Iterable[tuple[Row, str]], skipped: Counter[str]) -> Iterator[tuple[Read, str]]:
    """What the task makes of each row, and where that is; rows that are no examples are counted by their rule.

    Raises:
        BadRowError: for the first of those, with bad_rows=refuse.
    """
    for row, where in rows:
        try:
            yield task.read(row, where), where
        except BadRowError as error:
            if task.bad_rows == "refuse":
                raise
            skipped[error.rule] += 1
