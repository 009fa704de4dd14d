"""Tasks whose answer is a text: translation, summarisation, instructions, dialogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Gt

from llm.data.chat import Turn, opened, rendered
from llm.data.example import IGNORED
from llm.data.source import Row, check_weight
from llm.data.supervised import Answers, BadRowError, BadRows, Example, Read, Supervised
from llm.data.task import Widths
from llm.data.template import Template, encodable, value_of
from llm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TextToText(Supervised):
    """A text from another one: translation (Vaswani et al. 2017), summarisation, anything (Raffel et al. 2020).

    source, target   texts with columns in braces; the source is cut at its end where it is longer than a row
    """

    source: str = "{source}"
    target: str = "{target}"
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "encoder_decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens",)
    target_fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf", "rouge")

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.templates

    @property
    def templates(self) -> tuple[Template, Template]:
        """Of the source and of the target."""
        return Template("source", self.source), Template("target", self.target)

    def target_width(self, row: int) -> int:
        return row

    def read(self, row: Row, where: str) -> Read:
        texts = [template.fill(row, where) for template in self.templates]
        for text, side in zip(texts, ("source", "target"), strict=True):
            if not text.strip():
                raise BadRowError(where, f"the {side} is empty", "fill the column or remove the row")
        return Read(texts)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        source, target = (
            _ended(ids, width, tokenizer) for ids, width in zip(encoded, (widths.row, widths.target), strict=True)
        )
        cut = len(encoded[0]) >= widths.row or len(encoded[1]) >= widths.target
        shifted = np.concatenate([[tokenizer.pad_id], target[:-1]])
        return [Example({"tokens": source}, {"tokens": shifted, "labels": target}, cut=cut)]

    def prompt_of(self, read: Read, tokenizer: Tokenizer) -> list[int]:
        return [*tokenizer.encode(read.texts[0]), tokenizer.eot_id]

    def references(self, read: Read) -> list[str]:
        return [read.texts[1]]


@dataclass(frozen=True)
class Prompted(Supervised):
    """What follows a prompt, by a decoder: only the answer is learnt (Brown et al. 2020; Ouyang et al. 2022).

    prompt, answer   texts with columns in braces; where both are longer than a row, the prompt is cut at its beginning
    """

    prompt: str = "{prompt}"
    answer: str = "{answer}"
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    metrics: ClassVar[tuple[str, ...]] = ("squad", "rouge")

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.templates

    @property
    def templates(self) -> tuple[Template, Template]:
        """Of the prompt and of the answer."""
        return Template("prompt", self.prompt), Template("answer", self.answer)

    def read(self, row: Row, where: str) -> Read:
        prompt, answer = (template.fill(row, where) for template in self.templates)
        if not answer.strip():
            raise BadRowError(where, "the answer is empty", "fill the column or remove the row")
        return Read([prompt, answer])

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        prompt, whole = encoded
        answer = _ended(whole, widths.row, tokenizer)
        room = widths.row - len(answer)
        kept = prompt[max(0, len(prompt) - room) :]
        text = np.concatenate([[tokenizer.start_id], kept, answer])
        learnt = np.zeros(len(text), bool)
        learnt[1 + len(kept) :] = True
        return [next_tokens(text, learnt, cut=len(kept) < len(prompt) or len(answer) <= len(whole))]

    def prompt_of(self, read: Read, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.start_id, *tokenizer.encode(read.texts[0])]

    def references(self, read: Read) -> list[str]:
        return [read.texts[1].strip()]


@dataclass(frozen=True)
class Dialogue(Supervised):
    """A conversation, of which what the assistant says is learnt; its form is the tokenizer's chat template.

    messages        the column of the turns, a list of objects
    role, content   their keys
    roles           what the data calls the roles -> system, user or assistant; None: these names
    """

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] | None = None
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    metrics: ClassVar[tuple[str, ...]] = ("bleu", "rouge", "distinct")

    def __post_init__(self) -> None:
        check_weight(self.weight)
        wrong = [role for role in (self.roles or {}).values() if role not in ROLES]
        if wrong:
            raise ValueError(f"roles: {wrong[0]!r} is no role; there are {', '.join(ROLES)}")

    def read(self, row: Row, where: str) -> Read:
        turns = [self._turn(turn, f"{where}, turn {number}") for number, turn in enumerate(self._turns(row, where), 1)]
        if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
            raise BadRowError(where, "no turn of an assistant", "map the role with roles: {NAME: assistant}")
        return Read([turn.content for turn in turns], turns)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        text, learnt = rendered(read.rest, encoded, tokenizer)
        cut = len(text) > widths.row + 1
        text, learnt = text[: widths.row + 1], learnt[: widths.row + 1]
        return [next_tokens(text, learnt, cut=cut)] if learnt[1:].any() else "no answer within data.max_length"

    def prompt_of(self, read: Read, tokenizer: Tokenizer) -> list[int]:
        return opened(read.rest[: self._last(read)], tokenizer)

    def references(self, read: Read) -> list[str]:
        return [read.rest[self._last(read)].content.strip()]

    def _last(self, read: Read) -> int:
        """The number of the assistant's last turn."""
        return max(number for number, turn in enumerate(read.rest) if turn.role == "assistant")

    def _turns(self, row: Row, where: str) -> Sequence[Any]:
        turns = value_of(row, self.messages, where, "messages")
        if not isinstance(turns, list | tuple):
            rule = f"column {self.messages!r} holds {type(turns).__name__}, not a list of turns"
            raise BadRowError(where, rule, "name the column in messages")
        return turns

    def _turn(self, turn: Any, where: str) -> Turn:
        if not isinstance(turn, Mapping):
            rule = f"holds {type(turn).__name__}, not an object with {self.role!r} and {self.content!r}"
            raise BadRowError(where, rule, "write one for each turn")
        role, content = (
            value_of(dict(turn), self.role, where, "role"),
            value_of(dict(turn), self.content, where, "content"),
        )
        known = (self.roles or {}).get(role, role) if isinstance(role, str) else None
        if known not in ROLES:
            raise BadRowError(where, f"unknown role {role!r}", f"map it with roles: {{{role}: user}}")
        if not isinstance(content, str):
            raise BadRowError(where, f"{self.content!r} holds {type(content).__name__}", "it must be text")
        return Turn(known, encodable(content, self.content, where))


@dataclass(frozen=True)
class WriteCode(Supervised):
    """A program from a prompt, judged by running its tests (Chen et al. 2021, arXiv:2107.03374), by a decoder. It is
    not trained on: there is no one right answer.

    prompt    a text with columns in braces
    program   what is run to judge it: a text with columns in braces, and {completion}, what the model has written
    stop      where one of these begins, what is written is no part of it any more
    """

    prompt: str = "{prompt}"
    program: str = "{prompt}{completion}\n{test}\ncheck({entry_point})\n"
    stop: Sequence[str] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert")
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    metrics: ClassVar[tuple[str, ...]] = ("pass@1",)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if "completion" not in self.templates[1].columns:
            raise ValueError(f"program={self.program!r}: must hold {{completion}}, what the model has written")

    @property
    def templates(self) -> tuple[Template, Template]:
        """Of the prompt and of the program."""
        return Template("prompt", self.prompt), Template("program", self.program)

    def read(self, row: Row, where: str) -> Read:
        prompt, program = self.templates
        program.fill(row | {"completion": ""}, where)  # now, not after hours of generating
        return Read([prompt.fill(row, where)], (row, where))

    def program_of(self, read: Read, completion: str) -> str:
        """What is run to judge a completion."""
        row, where = read.rest
        return self.templates[1].fill(row | {"completion": completion}, where)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        return "programs are judged, not trained on"

    def prompt_of(self, read: Read, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.start_id, *tokenizer.encode(read.texts[0])]

    def references(self, read: Read) -> list[str]:
        return []


@dataclass(frozen=True)
class Preference(Supervised):
    """Of two answers to a prompt the better one, by a decoder (Rafailov et al. 2023, arXiv:2305.18290).

    prompt, chosen, rejected   texts with columns in braces; of a column that holds a conversation, a list of turns with
                               `role` and `content`, what is said last
    chat                       the prompt is what a user says and the answers what an assistant does, in the form of the
                               tokenizer's chat template
    """

    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    chat: bool = False
    bad_rows: BadRows = "refuse"
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    target_fields: ClassVar[tuple[str, ...]] = ("tokens", "labels")
    whole_fields: ClassVar[tuple[str, ...]] = ("pairs",)
    prefixes: ClassVar[tuple[str, str]] = ("", "rejected_")
    answers: ClassVar[Answers] = "preference"
    metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _ = self.templates

    @property
    def templates(self) -> list[Template]:
        """Of the prompt and of the two answers."""
        return [Template(key, getattr(self, key)) for key in ("prompt", "chosen", "rejected")]

    def target_width(self, row: int) -> int:
        return row

    def read(self, row: Row, where: str) -> Read:
        row = {name: _last_said(value) for name, value in row.items()}
        texts = [template.fill(row, where) for template in self.templates]
        for text, which in zip(texts[1:], ("chosen", "rejected"), strict=True):
            if not text.strip():
                raise BadRowError(where, f"the {which} answer is empty", "fill the column or remove the row")
        if texts[1] == texts[2]:
            raise BadRowError(where, "both answers are the same", "remove the row")
        return Read(texts)

    def examples(self, read: Read, encoded: list[Any], widths: Widths, tokenizer: Tokenizer) -> list[Example] | str:
        prompt, *answers = encoded
        sides = []
        for text, answer in zip(read.texts[1:], answers, strict=True):
            if self.chat:
                turns = [Turn("user", read.texts[0]), Turn("assistant", text)]
                whole, learnt = rendered(turns, [prompt, answer], tokenizer)
            else:
                whole = np.concatenate([[tokenizer.start_id], prompt, answer, [tokenizer.eot_id]])
                learnt = np.arange(len(whole)) > len(prompt)
            if len(whole) > widths.row + 1:
                return "an answer is longer than data.max_length with its prompt"
            sides.append(next_tokens(whole, learnt, cut=False).row)
        return [Example(sides[0], sides[1], whole={"pairs": 1})]

    def references(self, read: Read) -> list[str]:
        return [read.texts[1].strip()]


def _last_said(value: Any) -> Any:
    """Of a conversation; anything else as it is."""
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(turn, Mapping) and "content" in turn for turn in value)
    ):
        return value[-1]["content"]
    return value


def next_tokens(text: np.ndarray, learnt: np.ndarray, *, cut: bool) -> Example:
    """n + 1 tokens as n inputs and labels, of which those that are `learnt` (bool [n + 1]) are predicted."""
    return Example({"tokens": text[:-1], "labels": np.where(learnt[1:], text[1:], IGNORED)}, cut=cut)


def _ended(tokens: np.ndarray, width: int, tokenizer: Tokenizer) -> np.ndarray:
    """At most `width` tokens, of which the last ends the text."""
    return np.concatenate([tokens[: width - 1], [tokenizer.eot_id]])
