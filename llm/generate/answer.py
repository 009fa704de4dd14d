"""Many inputs to as many texts, in batches."""

from __future__ import annotations

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
        inputs: the tokens of each; where they leave no room, a source is cut before its last token, and a prompt at its
            beginning.
        batch_size: inputs at once.
        stop: where one of these texts begins, an answer ends.
        temperature: 0 takes the likeliest token; it and what follows as in `generate` and `beam_search`.
    """
    drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    decode = partial(generate, **drawing) if n_beams == 1 else partial(beam_search, n_beams=n_beams, alpha=alpha)
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    device = model.embed.weight.device
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        rows = [list(inputs[index]) for index in batch]
        if model.config.family == "encoder_decoder":
            kept = model.config.max_length - 1
            source = padded_source([[*row[:-1][:kept], row[-1]] for row in rows], tokenizer.pad_id, device)
            first = torch.full((len(rows), 1), tokenizer.pad_id, device=device)
            found = decode(model, first, max_new_tokens, eos_id=tokenizer.eot_id, source=source, agree=agree)
            n_read = 1
        else:
            room = max(1, model.config.max_length - max_new_tokens)
            tokens, padding = left_padded([row[-room:] for row in rows], tokenizer.pad_id, device)
            found = decode(model, tokens, max_new_tokens, eos_id=tokenizer.eot_id, padding=padding, agree=agree)
            n_read = tokens.shape[1]
        for index, row in zip(batch, found[:, n_read:].tolist(), strict=True):
            texts[index] = until(tokenizer.decode(row, skip_special=True), stop)
    return texts


def until(text: str, stop: Sequence[str]) -> str:
    """What comes before the first of these."""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))]
