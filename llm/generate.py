"""Continuing prompts: greedy or sampled, in batches, with a key/value cache.

Shapes: B prompts, T prompt length, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from llm.model.cache import Cache
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer


def _as_chosen(tokens: Tensor) -> Tensor:
    return tokens


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = _as_chosen,
) -> Tensor:
    """Prompts and what follows them: int64 [B, T] -> [B, T + n], n <= max_new_tokens.

    temperature     0 = greedy: always the likeliest token, nothing drawn
    top_k           draw among the k likeliest only (Fan et al. 2018, arXiv:1805.04833)
    top_p           draw among the fewest likeliest whose probabilities reach top_p, counted after temperature and
                    top_k (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751)
    eos_id          a row that gives this token is finished and filled with it; when all are, generation ends early
    padding         int64 [B], how many tokens at the left of each row are padding: prompts of unequal length
    generator       where draws come from, on the device of `tokens`; given one, torch's own state is left alone
    agree           called with each step's tokens; of a model that several processes hold together it gives all of them
                    the same ones, so that none ends before the others

    Generation also ends when a row fills the model's context, max_length tokens: beyond it the model never trained.
    The model may be in the midst of training: it runs in evaluation mode without gradients, and every module gets its
    mode back. Raises ValueError for prompts that are empty or fill the context already, and for bad arguments.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p, padding, generator)
    length = tokens.shape[1]
    end = min(length + max_new_tokens, model.config.max_length)
    cache = Cache(model.config.n_layers, end)
    documents, positions = _place(tokens, padding)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    new = tokens
    with torch.no_grad(), _eager(), _evaluating(model):
        while tokens.shape[1] < end:
            hidden = model(new, documents, positions, cache)
            logits = model.logits(hidden[:, -1])
            new = agree(choose(logits, temperature, top_k, top_p, generator))  # [B, 1]
            if eos_id is not None:
                new = new.masked_fill(finished.unsqueeze(1), eos_id)
                finished |= new.squeeze(1) == eos_id
            tokens = torch.cat((tokens, new), dim=1)
            if eos_id is not None and finished.all():
                break
            if documents is not None and positions is not None:
                documents, positions = torch.ones_like(new), positions[:, -1:] + 1
    return tokens


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = _as_chosen,
) -> str:
    """A document that begins with `prompt`, up to its end or `max_new_tokens` further on; settings as in `generate`.

    Of a prompt that fills the context only the end is read, and given back.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    read = ids[-(model.config.max_length - 1) :]
    tokens = generate(
        model,
        torch.tensor([read], device=model.embed.weight.device),  # [1, T]
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=tokenizer.eot_id,
        generator=generator,
        agree=agree,
    )
    return tokenizer.decode(tokens[0].tolist(), skip_special=True)


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row: [B, V] -> [B, 1], as `generate` describes. With temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # A diverged model gives noise; NaN in multinomial is an assertion on the device, after which CUDA is unusable.
    logits = torch.nan_to_num(logits.float() / temperature)
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    logits, candidates = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # likeliest first
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # 0 for the likeliest, which therefore always stays
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return candidates.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def _place(tokens: Tensor, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Documents (0 = padding, 1 = prompt) and positions (0 at the first real token) of left-padded rows."""
    if padding is None:
        return None, None
    positions = torch.arange(tokens.shape[1], device=tokens.device) - padding.unsqueeze(1)
    return (positions >= 0).long(), positions.clamp(min=0)


def _eager() -> AbstractContextManager[object]:
    """Leave a compiled model's compiled code aside: it would be compiled anew as the length grows.

    Only if the compiler was ever loaded; loading it takes over a second.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again, mixed as they may have been."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    padding: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be [prompts, length], both at least 1")
    max_length = model.config.max_length
    if tokens.shape[1] >= max_length:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens leaves no room in model.max_length = {max_length}; "
            f"give at most its last {max_length - 1} tokens"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: must be at least 0 (greedy) and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1; leave it out to draw among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1; leave it out to draw among all tokens")
    if padding is not None and padding.shape != tokens.shape[:1]:
        raise ValueError(f"padding has shape {tuple(padding.shape)}: must be [{tokens.shape[0]}], one count a prompt")
    if padding is not None and not ((padding >= 0) & (padding < tokens.shape[1])).all():
        raise ValueError(
            f"padding = {padding.tolist()}: must leave each prompt of {tokens.shape[1]} tokens at least one of them"
        )
    if generator is not None and generator.device.type != tokens.device.type:
        raise ValueError(
            f"generator is on {generator.device}, tokens on {tokens.device}; "
            f"take torch.Generator(device={tokens.device.type!r})"
        )
