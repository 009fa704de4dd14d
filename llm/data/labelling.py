"""Tasks whose answer is chosen: a label for a text, one for each of its words, a part of it. All by an encoder."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from annotated_types import Ge, Gt

from llm.data.example import IGNORED, Fields, enclosed
from llm.data.source import DataError, Row, check_weight
from llm.data.supervised import Answers, BadRowError, BadRows, Example, Read, Supervised
from llm.data.task import Widths
from llm.data.template import Template, encodable, value_of
from llm.tokenizer import Tokenizer


class Enclosed(Supervised):
    """A task whose texts an encoder reads between [CLS] and [SEP]."""

    family: ClassVar[str] = "encoder"

    def check(self, name: str, tokenizer: Tokenizer) -> None:
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise DataError(
                f"data.tasks.{name}: the tokenizer has no [CLS] and [SEP]; take tokenizer=wordpiece, or "
                "tokenizer=pretrained with an encoder's"
            )


class OfLabels(Enclosed):
    """A task whose answers are some of `labels`."""

    labels: Sequence[str]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name of a label, or its number as a text, which is what CSV has -> its number; of names that are numbers
        themselves only the names, since what else is a number is a mistake there."""
        names = {name: number for number, name in enumerate(self.labels)}
        are_numbers = any(name.isdecimal() for name in self.labels)
        return names if are_numbers else {str(number): number for number in range(len(self.labels))} | names

    def number(self, label: Any, where: str) -> int:
        """Of a label as the data has it: its name, or its number. Raises BadRowError."""
        found = None if label is None else self.numbers.get(str(label))
        if found is None:
            shown = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
            raise BadRowError(where, f"label {label!r} is not in labels ({shown})", "add it")
        return found


@dataclass(frozen=True)
class Classify(OfLabels):
    """One of a set of labels for a text or a pair of texts, from an encoder's first token (Devlin et al. 2019).

    text, second    texts with columns in braces; the second is the other part of a pair
    label           the column of the label, a name or a number
    labels          the names, in the order of their numbers
    """

    labels: Sequence[str]
    text: str = "{text}"
    second: str | None = None
    label: str = "label"
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments")
    whole_fields: ClassVar[tuple[str, ...]] = ("class_labels",)
    answers: ClassVar[Answers] = "label"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "classes")

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_labels(self.labels)
        _ = self.templates

    @property
    def templates(self) -> list[Template]:
        """Of the text, and of the second one."""
        given = {"text": self.text, "second": self.second}
        return [Template(key, text) for key, text in given.items() if text is not None]

    def read(self, row: Row, where: str) -> Read:
        texts = [template.fill(row, where) for template in self.templates]
        if not texts[0].strip():
            raise BadRowError(where, "the text is empty", "fill the column or remove the row")
        return Read(texts, self.number(value_of(row, self.label, where, "label"), where))

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        room = widths.row - 1 - len(encoded)
        if room < len(encoded):
            return "data.max_length has no room for a text"
        parts = _fitting(encoded, room)
        cut = any(len(part) < len(whole) for part, whole in zip(parts, encoded, strict=True))
        return [Example(read_by_encoder(parts, tokenizer), whole={"class_labels": read.rest}, cut=cut)]

    def shown(self, read: Read, max_length: int, tokenizer: Tokenizer) -> Fields:
        """What a trained model is given of a row: `tokens` and `segments`."""
        return read_by_encoder(
            _fitting(self.encode(read.texts, tokenizer), max_length - 1 - len(read.texts)), tokenizer
        )

    def references(self, read: Read) -> list[str]:
        return [self.labels[read.rest]]


@dataclass(frozen=True)
class Tag(OfLabels):
    """A label for each word of a text, from the word's first token (Devlin et al. 2019, section 5.3).

    words    the column of the words, a list of texts
    tags     the column of their labels, names or numbers, as many
    labels   the names, in the order of their numbers
    """

    labels: Sequence[str]
    words: str = "tokens"
    tags: str = "tags"
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "labels")
    answers: ClassVar[Answers] = "tags"
    metrics: ClassVar[tuple[str, ...]] = ("tags",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_labels(self.labels)

    def read(self, row: Row, where: str) -> Read:
        words, tags = (
            value_of(row, column, where, key) for column, key in ((self.words, "words"), (self.tags, "tags"))
        )
        if not isinstance(words, list | tuple) or not isinstance(tags, list | tuple):
            rule = f"{self.words!r} and {self.tags!r} are not two lists, of words and of their labels"
            raise BadRowError(where, rule, "name their columns in words and tags")
        if not words:
            raise BadRowError(where, "there are no words", "remove the row")
        if len(words) != len(tags):
            raise BadRowError(where, f"{len(words)} words and {len(tags)} tags", "give each word one")
        numbers = [self.number(tag, where) for tag in tags]
        return Read([encodable(str(word), self.words, where) for word in words], numbers)

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[Any]:
        """Each word behind a blank but for the first, as it stands in a text."""
        return super().encode([text if tokenizer.is_word_piece else f" {text}" for text in texts], tokenizer)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        room = widths.row - 2
        if room < 1:
            return "data.max_length has no room for a word"
        labels = [
            np.array([number, *[IGNORED] * (len(ids) - 1)])
            for number, ids in zip(read.rest, encoded, strict=True)
            if len(ids)
        ]
        if not labels:
            return "no word has a token"
        text, told = np.concatenate(encoded), np.concatenate(labels)
        row = read_by_encoder([text[:room]], tokenizer)
        row["labels"] = np.concatenate([[IGNORED], told[:room], [IGNORED]])
        return [Example(row, cut=len(text) > room)]

    def shown(self, read: Read, max_length: int, tokenizer: Tokenizer) -> Fields:
        """What a trained model is given of a row, with `labels` where words begin."""
        made = self.examples(read, self.encode(read.texts, tokenizer), Widths(max_length, 0), tokenizer)
        assert not isinstance(made, str), made
        return made[0].row

    def references(self, read: Read) -> list[str]:
        return [" ".join(self.labels[number] for number in read.rest)]


class Window(NamedTuple):
    """A part of a context beside its question, as a model sees it.

    fields   `tokens` and `segments`
    first    where in them the part begins
    offsets  int64 [n, 2], where in the context each of its tokens begins and ends
    """

    fields: Fields
    first: int
    offsets: np.ndarray


@dataclass(frozen=True)
class ExtractSpan(Enclosed):
    """The part of a context that answers a question, or none (Rajpurkar et al. 2016, 2018; Devlin et al. 2019).

    A context that is longer than a row is read in windows, each `stride` tokens further on than the one before; an
    answer that a window does not hold is, for that window, none: its first token stands for that.

    question, context   texts with columns in braces
    answers_column      the column of the answers, as SQuAD has it: a list of objects with `text` and `answer_start`,
                        or one object with a list of each; empty: the question has no answer (SQuAD 2)
    longest_answer      tokens, of answers that are looked for
    no_answer           whether questions may have none (SQuAD 2); else a row without an answer is a bad one, and every
                        question is answered
    """

    question: str = "{question}"
    context: str = "{context}"
    answers_column: str = "answers"
    stride: Annotated[int, Ge(1)] = 128
    longest_answer: Annotated[int, Ge(1)] = 30
    no_answer: bool = False
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    labels: ClassVar[tuple[str, ...]] = ("start", "end")  # what a token's scores are of
    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments")
    whole_fields: ClassVar[tuple[str, ...]] = ("start_labels", "end_labels")
    alone: ClassVar[bool] = True
    answers: ClassVar[Answers] = "span"
    metrics: ClassVar[tuple[str, ...]] = ("squad",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.templates

    @property
    def templates(self) -> tuple[Template, Template]:
        """Of the question and of the context."""
        return Template("question", self.question), Template("context", self.context)

    def read(self, row: Row, where: str) -> Read:
        question, context = (template.fill(row, where) for template in self.templates)
        for text, what in ((question, "question"), (context, "context")):
            if not text.strip():
                raise BadRowError(where, f"the {what} is empty", "fill the column or remove the row")
        answers = _answers(value_of(row, self.answers_column, where, "answers_column"), where)
        if not answers and not self.no_answer:
            raise BadRowError(where, "there is no answer", "set no_answer=true if that is one")
        for text, start in answers:
            if context[start : start + len(text)] != text or start < 0:
                raise BadRowError(where, f"answer {text!r} is not at {start} of its context", "mend answer_start")
        return Read([question, context], answers)

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[Any]:
        """Tokens, and where each begins and ends in the text."""
        return tokenizer.encode_offsets(texts)

    def windows(self, encoded: list[Any], max_length: int, tokenizer: Tokenizer) -> list[Window]:
        """What a model of `max_length` tokens is shown of a question and its context."""
        (question, _), (context, offsets) = encoded
        question = question[: max(1, max_length // 2)]
        room = max_length - len(question) - 3
        found, first = [], 0
        while True:
            part = slice(first, first + room)
            found.append(
                Window(read_by_encoder([question, context[part]], tokenizer), len(question) + 2, offsets[part])
            )
            if first + room >= len(context):
                return found
            first += min(self.stride, room)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        if widths.row < 8:
            return "data.max_length has no room for a question and a context"
        made = []
        for window in self.windows(encoded, widths.row, tokenizer):
            span = (0, 0)
            if read.rest:
                text, start = read.rest[0]
                span = _place(window, start, start + len(text)) or span
            made.append(Example(window.fields, whole={"start_labels": span[0], "end_labels": span[1]}))
        return made

    def references(self, read: Read) -> list[str]:
        return [text for text, _ in read.rest]


def read_by_encoder(parts: list[np.ndarray], tokenizer: Tokenizer) -> Fields:
    """One text or two, as an encoder reads them."""
    return enclosed(parts, tokenizer.cls_id, tokenizer.sep_id)


def _check_labels(labels: Sequence[str]) -> None:
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError(f"labels={list(labels)}: give at least two names, each once")


def _answers(given: Any, where: str) -> list[tuple[str, int]]:
    """Text and place of each answer, from either form."""
    texts, starts = (given.get(key) for key in ("text", "answer_start")) if isinstance(given, Mapping) else (None, None)
    if isinstance(texts, list | tuple) and isinstance(starts, list | tuple) and len(texts) == len(starts):
        pairs = [*zip(texts, starts, strict=True)]
    elif isinstance(given, list | tuple) and all(isinstance(one, Mapping) for one in given):
        pairs = [(one.get("text"), one.get("answer_start")) for one in given]
    else:
        rule = "the answers are no list of objects with text and answer_start, nor one object with two lists as long"
        raise BadRowError(where, rule, "name another answers_column")
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int):
            raise BadRowError(
                where, f"answer {text!r} at {start!r}", "give a text and the number of its first character"
            )
    return pairs


def _place(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """The tokens of a window that hold the characters from `start` to `end` of the context; None: not all of them."""
    begins, ends = window.offsets[:, 0].tolist(), window.offsets[:, 1].tolist()
    if not begins or start < begins[0] or end > ends[-1]:
        return None
    first, last = bisect_right(begins, start) - 1, bisect_left(ends, end)
    return window.first + first, window.first + last


def _fitting(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """The longer one is cut first, as BERT's pairs are."""
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = (len(part) for part in parts)
    if first + second > room:
        half = room // 2
        first, second = (
            (room - second, second)
            if second <= half
            else (first, room - first)
            if first <= room - half
            else (room - half, half)
        )
    return [parts[0][:first], parts[1][:second]]
