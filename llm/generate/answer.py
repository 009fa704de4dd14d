"""Many inputs to as many texts, in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.generate.batch import left_padded, padded_source
from llm.generate.beam import beam_search
from llm.generate.decode import as_chosen, generate
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    inputs: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_beams: int = 1,
    alpha: float = 0.6,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
    agree: Callable[[Tensor], Tensor] = as_chosen,
) -> list[str]:
    """What the model writes for each input, without it: an encoder-decoder's target of a source, a decoder's text
    behind a prompt.

    Inputs of like length share a batch, so that little is padded; the answers come in the order of the inputs.

    Args:
        inputs: the tokens of each; a source that the context does not hold is cut before its last token, and a prompt
            at its beginning, as `room_for_prompt` says; how many were cut is logged.
        max_new_tokens: fewer where the context is full.
        batch_size: inputs at once.
        stop: where one of these texts begins, an answer ends.
        temperature: 0 takes the likeliest token; it and what follows as in `generate` and `beam_search`.
    """
    drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    decode = partial(generate, **drawing) if n_beams == 1 else partial(beam_search, n_beams=n_beams, alpha=alpha)
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    device = model.embed.weight.device
    encodes = model.config.family == "encoder_decoder"
    room = model.config.max_length if encodes else room_for_prompt(model.config.max_length, max_new_tokens)
    n_cut = sum(len(one) > room for one in inputs)
    if n_cut:
        _log.warning(
            "%d of %d inputs are cut to %d tokens: model.max_length = %d%s",
            *(n_cut, len(inputs), room, model.config.max_length),
            "" if encodes else f", of which max_new_tokens = {max_new_tokens} get what they can",
        )
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        rows = [list(inputs[index]) for index in batch]
        if encodes:
            source = padded_source([[*row[:-1][: room - 1], row[-1]] for row in rows], tokenizer.pad_id, device)
            first = torch.full((len(rows), 1), tokenizer.pad_id, device=device)
            found = decode(model, first, max_new_tokens, eos_id=tokenizer.eot_id, source=source, agree=agree)
            n_read = 1
        else:
            tokens, padding = left_padded([row[-room:] for row in rows], tokenizer.pad_id, device)
            found = decode(model, tokens, max_new_tokens, eos_id=tokenizer.eot_id, padding=padding, agree=agree)
            n_read = tokens.shape[1]
        for index, row in zip(batch, found[:, n_read:].tolist(), strict=True):
            texts[index] = until(tokenizer.decode(row, skip_special=True), stop)
    return texts


def room_for_prompt(max_length: int, max_new_tokens: int) -> int:
    """How many tokens of a prompt a context of `max_length` has room for: an answer may take the rest, but no more than
    a quarter of the context from a prompt, as without its question an answer is worth nothing."""
    return max(1, max_length - max(1, min(max_new_tokens, max_length // 4)))


def until(text: str, stop: Sequence[str]) -> str:
    """What comes before the first of these."""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))]
