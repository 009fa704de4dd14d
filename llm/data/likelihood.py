"""Tasks whose answer is the likeliest of some texts, or a text that is to be likely: how language models are compared.

All by a decoder, which may be trained on them too: on the right text behind its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Gt

from llm.data.source import Row, check_weight
from llm.data.supervised import BadRowError, BadRows, Example, Read, Supervised
from llm.data.task import Widths
from llm.data.template import Template, value_of
from llm.data.writing import Prompted
from llm.tokenizer import Tokenizer


class Likelihoods(Supervised):
    """What such tasks share: each row is some candidates, a context and a continuation each, and which of them is the
    right one."""

    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    context: str
    continuation: str
    delimiter: str

    @property
    def templates(self) -> tuple[Template, Template]:
        """Of the context and of the continuation."""
        return Template("context", self.context), Template("continuation", self.continuation)

    def candidates(self, read: Read) -> list[tuple[str, str]]:
        """Context and continuation of each; a continuation begins with what stands between the two."""
        found: list[tuple[str, str]] = read.rest[0]
        return found

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        return Prompted().examples(read, encoded, widths, tokenizer)

    def references(self, read: Read) -> list[str]:
        return [read.texts[1].strip()]

    def _read(self, candidates: list[tuple[str, str]], gold: int) -> Read:
        return Read([candidates[gold][0], candidates[gold][1]], (candidates, gold))


@dataclass(frozen=True)
class Choose(Likelihoods):
    """The likeliest of several continuations of a context, or, with `contexts`, the context that makes a continuation
    likeliest (Brown et al. 2020, section 2.4; Trinh and Le 2018).

    context, continuation   texts with columns in braces; {choice} is what is chosen
    choices                 the column of the choices, a list of texts
    gold                    the column of the number of the right one
    delimiter               between context and continuation
    """

    context: str = "{query}"
    continuation: str = "{choice}"
    choices: str = "choices"
    gold: str = "gold"
    delimiter: str = " "
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    metrics: ClassVar[tuple[str, ...]] = ("choices",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        columns = [name for template in self.templates for name in template.columns]
        if "choice" not in columns:
            raise ValueError(
                f"context={self.context!r}, continuation={self.continuation!r}: one of them must hold {{choice}}"
            )

    def read(self, row: Row, where: str) -> Read:
        choices, gold = (
            value_of(row, column, where, key) for key, column in (("choices", self.choices), ("gold", self.gold))
        )
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            raise BadRowError(where, f"column {self.choices!r} holds no list of at least two choices", "give some more")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise BadRowError(where, f"{self.gold!r} is {gold!r}", f"it must be from 0 to {len(choices) - 1}")
        context, continuation = self.templates
        pairs = [
            (
                context.fill(row | {"choice": choice}, where),
                self.delimiter + continuation.fill(row | {"choice": choice}, where),
            )
            for choice in choices
        ]
        return self._read(pairs, gold)


@dataclass(frozen=True)
class Cloze(Likelihoods):
    """The end of a text, which is to be the likeliest one, token by token (LAMBADA: Paperno et al. 2016).

    context, continuation   texts with columns in braces
    delimiter               between the two
    """

    context: str = "{context}"
    continuation: str = "{continuation}"
    delimiter: str = " "
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    metrics: ClassVar[tuple[str, ...]] = ("cloze",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.templates

    def read(self, row: Row, where: str) -> Read:
        context, continuation = (template.fill(row, where) for template in self.templates)
        if not continuation.strip():
            raise BadRowError(where, "the continuation is empty", "fill the column or remove the row")
        return self._read([(context, self.delimiter + continuation)], 0)


@dataclass(frozen=True)
class Perplexity(Supervised):
    """Whole texts, every token from those before it, in windows as long as the model's context.

    text    a text with columns in braces
    stride  tokens that a window adds to the one before, whose other tokens they see; null: half a context. 1 gives
            every token all the context that there is, and costs that many windows
    """

    text: str = "{text}"
    stride: Annotated[int, Gt(0)] | None = None
    bad_rows: BadRows = "skip"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.template

    @property
    def template(self) -> Template:
        """Of the text."""
        return Template("text", self.text)

    def read(self, row: Row, where: str) -> Read:
        text = self.template.fill(row, where)
        if not text.strip():
            raise BadRowError(where, "the text is empty", "fill the column or remove the row")
        return Read([text])

    def windows(self, tokens: list[int], start: int, longest: int) -> list[tuple[list[int], list[int]]]:
        """What is seen and what is predicted in each window of at most `longest` tokens; all of it, once."""
        step = min(self.stride or longest // 2, longest - 1)
        seen = [start, *tokens]
        found = []
        for at in range(0, len(tokens), step):
            new = tokens[at : at + step]
            found.append((seen[max(0, at + 1 - (longest - len(new))) : at + 1], new))
        return found

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        return Prompted().examples(read, [encoded[0][:0], encoded[0]], widths, tokenizer)

    def references(self, read: Read) -> list[str]:
        return []
