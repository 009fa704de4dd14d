"""Texts with the columns of a row in braces: `translate English to German: {en}`."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import Any

from llm.data.source import Row, half_pair
from llm.data.supervised import BadRowError


@dataclass(frozen=True)
class Template:
    """`text` with the names of columns in braces; {{ and }} are braces. Nothing but plain names: a row is data, and
    says what is written, not what is done.

    Raises ValueError naming `key` for anything else in braces, and for a text without a column.
    """

    key: str
    text: str

    def __post_init__(self) -> None:
        try:
            parts = [*Formatter().parse(self.text)]
        except ValueError as error:
            raise ValueError(f"{self.key}={self.text!r}: {error}; a brace that is meant is written twice") from None
        wrong = [name for _, name, form, how in parts if name is not None and (not name.isidentifier() or form or how)]
        if wrong:
            raise ValueError(f"{self.key}={self.text!r}: {{{wrong[0]}}} is no name of a column; write {{column}}")
        if not self.columns:
            raise ValueError(f"{self.key}={self.text!r}: names no column; write {{column}} where its text goes")

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [name for _, name, _, _ in Formatter().parse(self.text) if name]

    def fill(self, row: Row, where: str) -> str:
        """The text of a row; null is no text, texts in a list stand below each other. Raises BadRowError: no such
        column, or something else in it."""
        values = {name: _text(row, name, where, self.key) for name in self.columns}
        return self.text.format_map(values)


def value_of(row: Row, column: str, where: str, key: str) -> Any:
    """What `column` of a row holds. Raises BadRowError, naming the `key` that wants it, if there is no such column."""
    if column in row:
        return row[column]
    names = ", ".join(map(repr, row))
    near = get_close_matches(column, map(str, row), n=1)
    hint = f"name {near[0]!r}" if near else f"name one of these in {key}"
    raise BadRowError(where, f"no column {column!r} for {key}", f"it has {names} - {hint}")


def encodable(text: str, column: str, where: str) -> str:
    """The text of a column. Raises BadRowError for half of a surrogate pair in it, which no tokenizer takes."""
    if half_pair(text) is not None:
        rule = f"column {column!r} has half of a surrogate pair"
        raise BadRowError(where, rule, "repair the escape in the file")
    return text


def _text(row: Row, column: str, where: str, key: str) -> str:
    value = value_of(row, column, where, key)
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return encodable(str(value), column, where)
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return encodable("\n".join(value), column, where)
    raise BadRowError(where, f"column {column!r} holds {type(value).__name__}, not text", f"name another one in {key}")
