"""Prompts to texts, whatever the family of the model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.generate.answer import until
from llm.generate.beam import beam_search
from llm.generate.decode import as_chosen, generate
from llm.generate.fill import fill_mask, fill_spans
from llm.model.transformer import Source, Transformer
from llm.tokenizer import Tokenizer


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_beams: int = 1,
    alpha: float = 0.6,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = as_chosen,
) -> str:
    """A document that begins with `prompt`, up to its end or `max_new_tokens` further on; settings as in `generate`,
    with more than one beam as in `beam_search`.

    Special tokens written in the prompt are meant as such. After <fim_prefix> A <fim_suffix> B <fim_middle> the text is
    A, what the model puts between, and B. Of a prompt that fills the context only the end is read, and given back.
    What the model adds ends before the first text of `stop`.
    """
    ids = [tokenizer.start_id, *tokenizer.encode_marked(prompt)]
    read = ids[-(model.config.max_length - 1) :]
    tokens = torch.tensor([read], device=model.embed.weight.device)  # [1, T]
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    write = _writer(tokenizer, max_new_tokens, n_beams, alpha, agree, drawing)
    return _in_order(tokenizer, read, write(model, tokens)[0, len(read) :].tolist(), stop)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_beams: int = 1,
    alpha: float = 0.6,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = as_chosen,
) -> list[str]:
    """What the model makes of each prompt: a decoder continues it, an encoder-decoder fills its spans or answers it,
    and an encoder fills its masks, with the likeliest tokens for each below. Settings as in `continue_text`; an encoder
    has none. Masks and spans are not cut at a `stop`: they end by themselves."""
    if model.config.family == "encoder":
        return [_filled(model, tokenizer, prompt) for prompt in prompts]
    drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    if model.config.family == "encoder_decoder":
        write = _writer(tokenizer, max_new_tokens, n_beams, alpha, agree, drawing)
        texts = fill_spans(model, tokenizer, prompts, write=write) if prompts else []
        gaps = set(tokenizer.sentinel_ids)
        filled = [bool(gaps.intersection(tokenizer.encode_marked(prompt))) for prompt in prompts]
        return [text if has_gaps else until(text, stop) for text, has_gaps in zip(texts, filled, strict=True)]
    settings = {**drawing, "n_beams": n_beams, "alpha": alpha, "stop": stop, "agree": agree}
    return [continue_text(model, tokenizer, prompt, max_new_tokens, **settings) for prompt in prompts]


def _writer(
    tokenizer: Tokenizer,
    max_new_tokens: int,
    n_beams: int,
    alpha: float,
    agree: Callable[[Tensor], Tensor],
    drawing: dict[str, Any],
) -> Callable[..., Tensor]:
    """From model, first tokens and perhaps a source to tokens."""
    decode = partial(generate, **drawing) if n_beams == 1 else partial(beam_search, n_beams=n_beams, alpha=alpha)

    def write(model: Transformer, tokens: Tensor, source: Source | None = None) -> Tensor:
        return decode(model, tokens, max_new_tokens, eos_id=tokenizer.eot_id, source=source, agree=agree)

    return write


def _in_order(tokenizer: Tokenizer, read: list[int], new: list[int], stop: Sequence[str]) -> str:
    """The text of a prompt and what follows, up to a `stop`; a middle that follows its suffix goes where it belongs."""
    before, after = read, []
    if tokenizer.fim_ids is not None:
        prefix, middle, suffix = (read.index(token) if token in read else -1 for token in tokenizer.fim_ids)
        if 0 <= prefix < suffix < middle:
            before, after = [*read[:suffix], *read[middle + 1 :]], read[suffix + 1 : middle]
    text = tokenizer.decode([*before, *new, *after], skip_special=True)
    # Told apart as texts: a token of the prompt's may decode otherwise alone than behind others.
    given = tokenizer.decode(before, skip_special=True)
    written = tokenizer.decode([*before, *new], skip_special=True)[len(given) :]
    kept = until(written, stop)
    return text if kept == written else given + kept + tokenizer.decode(after, skip_special=True)


def _filled(model: Transformer, tokenizer: Tokenizer, prompt: str) -> str:
    """The filled text, and a line for each mask."""
    text, masks = fill_mask(model, tokenizer, prompt)
    lines = ["  ".join(f"{word} {share:.1%}" for word, share in mask) for mask in masks]
    return "\n".join([text, *(f"  mask {number}: {line}" for number, line in enumerate(lines, 1))])
