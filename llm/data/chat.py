"""Conversations as a model reads them, by the chat template of its tokenizer.

A template is a small program in a model's folder (Jinja, in a sandbox), which writes special tokens around what was
said. What was said is data: in the template's place it is a mark, so that no text can pass itself off as a token.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from llm.data.source import DataError
from llm.tokenizer import Tokenizer

# Where a tokenizer has none: names that any tokenizer can write, and the end of text behind each answer.
PLAIN = (
    "{% for message in messages %}{{ '\\n' if not loop.first }}{{ message['role'] }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{{ '\\nassistant:\\n' if add_generation_prompt }}"
)
_MARK = "\ue000{}\ue001"  # private use: in no text, and no template changes them
_MARKS = re.compile("\ue000([0-9]+)\ue001")


class Turn(NamedTuple):
    """Who speaks (system, user or assistant), and what."""

    role: str
    content: str


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of the tokenizer, or `PLAIN`."""
    return tokenizer.config.get("chat_template") or PLAIN


def rendered(turns: list[Turn], tokens: list[np.ndarray], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, int64 [n], and which of them the assistant writes, bool [n].

    `tokens` are those of each turn's content. What the assistant writes is what stands behind the template's opening of
    its turn: its words, and what ends the turn.
    """
    pieces: list[np.ndarray] = []
    learnt: list[np.ndarray] = []
    done = ""
    for number, turn in enumerate(turns, 1):
        whole = _render(tokenizer, turns, number)
        if not whole.startswith(done):
            raise DataError(
                "the tokenizer's chat template changes what came before when a turn is added, so that turns cannot be "
                "told apart; use another chat_template in tokenizer_config.json"
            )
        opening = _render(tokenizer, turns, number - 1, opening=True) if turn.role == "assistant" else whole
        opening = opening if whole.startswith(opening) and len(opening) >= len(done) else done
        for text, mine in ((opening[len(done) :], False), (whole[len(opening) :], True)):
            ids = _encoded(text, tokens, tokenizer)
            pieces.append(ids)
            learnt.append(np.full(len(ids), mine and turn.role == "assistant"))
        done = whole
    flat = np.concatenate(pieces)
    if len(flat) == 0 or flat[0] != tokenizer.start_id:  # a template may write the first token itself
        return np.concatenate([[tokenizer.start_id], flat]), np.concatenate([[False], *learnt])
    return flat, np.concatenate(learnt)


def opened(turns: list[Turn], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation up to where the assistant is to speak."""
    tokens = tokenizer.encode_batch([turn.content for turn in turns])
    ids = _encoded(_render(tokenizer, turns, len(turns), opening=True), tokens, tokenizer).tolist()
    return ids if ids[:1] == [tokenizer.start_id] else [tokenizer.start_id, *ids]


def _encoded(text: str, tokens: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of what a template wrote, in which marks stand for the contents of turns."""
    parts = _MARKS.split(text)  # template, number of a turn, template, …
    ids: list[np.ndarray] = []
    for at, part in enumerate(parts):
        ids.append(tokens[int(part)] if at % 2 else np.array(tokenizer.encode_marked(part), np.int64))
    return np.concatenate(ids).astype(np.int64) if ids else np.empty(0, np.int64)


def _render(tokenizer: Tokenizer, turns: list[Turn], n_turns: int, *, opening: bool = False) -> str:
    """The first `n_turns`, with marks for contents; with the `opening` of an answer."""
    if n_turns == 0 and not opening:
        return ""
    messages = [{"role": turn.role, "content": _MARK.format(number)} for number, turn in enumerate(turns[:n_turns])]
    names = {f"{key}_token": _name(tokenizer.config.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")}
    names["eos_token"] = names["eos_token"] or tokenizer.backend.id_to_token(tokenizer.eot_id) or ""
    import jinja2

    try:
        return _compiled(template_of(tokenizer)).render(messages=messages, add_generation_prompt=opening, **names)
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template: {error}") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """As transformers has it: without blanks around blocks, and with `raise_exception` for templates to refuse with."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _name(token: Any) -> str:
    """Of a special token, which some files describe by an object."""
    return token.get("content", "") if isinstance(token, dict) else token or ""
