"""Gaps in a text: masks by an encoder, spans by an encoder-decoder."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llm.generate.batch import padded_source
from llm.generate.decode import generate, undisturbed
from llm.model.transformer import Source, Transformer
from llm.tokenizer import Tokenizer

Write = Callable[[Transformer, Tensor, Source], Tensor]


class Candidate(NamedTuple):
    """A token for a mask, and how probable it is there."""

    text: str
    probability: float


def fill_mask(
    model: Transformer, tokenizer: Tokenizer, prompt: str, top_k: int = 5
) -> tuple[str, list[list[Candidate]]]:
    """The prompt with the likeliest token in place of each mask, and the `top_k` likeliest tokens for each mask.

    Each mask is filled by itself, the others being masks. The prompt names the mask as the tokenizer does ([MASK],
    <mask>); without one, a mask at its end asks for the next word. Of a prompt longer than the context a part that
    holds the first mask is read.

    Raises ValueError for a model that is no encoder and a tokenizer without a mask.
    """
    if model.config.family != "encoder":
        raise ValueError(f"model.family={model.config.family} fills no masks, only an encoder does")
    if tokenizer.mask_id is None:
        raise ValueError("the tokenizer has no mask token, so there is nothing to fill; use that of a masked LM")
    ids = _encode(tokenizer, prompt, [tokenizer.mask_id])
    if tokenizer.mask_id not in ids:
        ids.append(tokenizer.mask_id)
    before = [] if tokenizer.cls_id is None else [tokenizer.cls_id]
    after = [] if tokenizer.sep_id is None else [tokenizer.sep_id]
    room = model.config.max_length - len(before) - len(after)
    start = max(0, min(ids.index(tokenizer.mask_id), len(ids) - room))
    ids = [*before, *ids[start : start + room], *after]
    masked = [place for place, token in enumerate(ids) if token == tokenizer.mask_id]
    with undisturbed(model):
        hidden = model(torch.tensor([ids], device=model.embed.weight.device))  # [1, T, D]
        logits = model.logits(hidden[0, masked]).float()  # [masks, V]
        probabilities, tokens = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    candidates = [
        [Candidate(tokenizer.decode([token]).strip(), share) for token, share in zip(row, shares, strict=True)]
        for row, shares in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]
    for place, best in zip(masked, tokens[:, 0].tolist(), strict=True):
        ids[place] = best
    return tokenizer.decode(ids, skip_special=True), candidates


def fill_spans(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int = 100,
    *,
    write: Write | None = None,
) -> list[str]:
    """Each prompt with the text that the model writes for its sentinels (<extra_id_0>, <extra_id_1>, …) in their
    places; of a prompt without any, what the model writes from it. Prompts are read together, of whatever lengths.

    A sentinel that the model says nothing for stays. What of a prompt is beyond the context is not read.

    write    from model, first tokens [B, 1] and source to target tokens [B, n]; None is greedy

    Raises ValueError for a model that is no encoder-decoder.
    """
    if model.config.family != "encoder_decoder":
        raise ValueError(f"model.family={model.config.family} fills no spans, only an encoder_decoder does")
    room = model.config.max_length - 1
    read = [[*_encode(tokenizer, prompt, tokenizer.sentinel_ids)[:room], tokenizer.eot_id] for prompt in prompts]
    device = model.embed.weight.device
    source = padded_source(read, tokenizer.pad_id, device)
    start = torch.full((len(prompts), 1), tokenizer.pad_id, device=device)
    if write is None:
        targets = generate(model, start, max_new_tokens, temperature=0, eos_id=tokenizer.eot_id, source=source)
    else:
        targets = write(model, start, source)
    written = [_until(target, tokenizer.eot_id) for target in targets[:, 1:].tolist()]
    return [_merge(tokenizer, ids[:-1], target) for ids, target in zip(read, written, strict=True)]


def _encode(tokenizer: Tokenizer, prompt: str, gaps: list[int]) -> list[int]:
    """The prompt's tokens. The space before a gap is left out: it belongs to the word that will stand there."""
    names = "|".join(re.escape(tokenizer.backend.id_to_token(gap) or "") for gap in gaps)
    return tokenizer.encode_marked(re.sub(rf" +(?={names})", "", prompt) if names else prompt)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _merge(tokenizer: Tokenizer, ids: list[int], target: list[int]) -> str:
    """The source with each sentinel replaced by what follows the same sentinel in the target."""
    sentinels = set(tokenizer.sentinel_ids)
    if not sentinels.intersection(ids):
        return tokenizer.decode(target, skip_special=True)
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in target:
        if token in sentinels:
            span = []
            spans.setdefault(token, span)  # said again, it is not heard
        elif token != tokenizer.pad_id:
            span.append(token)
    filled = [part for token in ids for part in (spans.get(token) or [token])]
    return tokenizer.decode(filled)
