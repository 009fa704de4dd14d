"""A conversation with a model at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from llm.data.chat import Turn, opened
from llm.generate import generate, room_for_prompt
from llm.generate.stream import Stream
from llm.model import Transformer
from llm.tokenizer import Tokenizer


def talk(
    model: Transformer,
    tokenizer: Tokenizer,
    said: Iterable[str],
    write: Callable[[str], object],
    *,
    system: str | None = None,
    max_new_tokens: int = 200,
    **drawing: Any,
) -> list[Turn]:
    """Answer each thing that is said, as the tokenizer's chat template has it; gives the conversation.

    What does not fit the context any more is forgotten, turn by turn from the beginning, but for what the system says.

    Args:
        said: lines of the user's.
        write: gets the answers as they are written.
        drawing: settings of `generate`.
    """
    first = [] if system is None else [Turn("system", system)]
    turns = list(first)
    room = room_for_prompt(model.config.max_length, max_new_tokens)
    for line in said:
        turns.append(Turn("user", line))
        ids = opened(turns, tokenizer)
        while len(ids) > room and len(turns) > len(first) + 1:
            del turns[len(first)]
            ids = opened(turns, tokenizer)
        stream = Stream(tokenizer, write)
        tokens = torch.tensor([ids[-room:]], device=model.embed.weight.device)
        generate(model, tokens, max_new_tokens, eos_id=tokenizer.eot_id, agree=stream, **drawing)
        write("\n")
        turns.append(Turn("assistant", stream.text.strip()))
    return turns
