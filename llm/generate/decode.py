"""Continuing prompts: greedy or sampled, in batches, with a key/value cache.

Shapes: B prompts, T prompt length, S source length, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from llm.model.cache import Cache
from llm.model.transformer import Source, Transformer


def as_chosen(values: Tensor) -> Tensor:
    """What `agree` is in one process, which agrees with itself."""
    return values


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
    source: Source | None = None,
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = as_chosen,
) -> Tensor:
    """Prompts and what follows them: int64 [B, T] -> [B, T + n], n <= max_new_tokens.

    temperature     0 = greedy: always the likeliest token, nothing drawn
    top_k           draw among the k likeliest only (Fan et al. 2018, arXiv:1805.04833)
    top_p           draw among the fewest likeliest whose probabilities reach top_p, counted after temperature and
                    top_k (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751)
    eos_id          a row that gives this token is finished and filled with it; when all are, generation ends early
    padding         int64 [B], how many tokens at the left of each row are padding: prompts of unequal length
    source          what an encoder-decoder's encoder reads, a row for each of `tokens`, which is then what the target
                    begins with. Of unequal length: with documents 1 and, at the padding, 0
    generator       where draws come from, on the device of `tokens`; given one, torch's own state is left alone
    agree           called with each step's tokens; of a model that several processes hold together it gives all of them
                    the same ones, so that none ends before the others

    Generation also ends when a row fills the model's context, max_length tokens: beyond it the model never trained.
    The model may be in the midst of training: it runs in evaluation mode without gradients, and every module gets its
    mode back. Raises ValueError for prompts that are empty or fill the context already, and for bad arguments.
    """
    check_prompts(model, tokens, max_new_tokens, padding, source)
    _check_drawing(tokens, temperature, top_k, top_p, generator)
    length = tokens.shape[1]
    end = min(length + max_new_tokens, model.config.max_length)
    cache = Cache(model.config.decoder_layers, end)
    documents, positions = place(tokens, padding)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    new = tokens
    with undisturbed(model):
        while tokens.shape[1] < end:
            hidden = model(new, documents, positions, cache, source=None if cache.has_memory else source)
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


def place(tokens: Tensor, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Documents (0 = padding, 1 = prompt) and positions (0 at the first real token) of left-padded rows."""
    if padding is None:
        return None, None
    positions = torch.arange(tokens.shape[1], device=tokens.device) - padding.unsqueeze(1)
    return (positions >= 0).long(), positions.clamp(min=0)


@contextmanager
def undisturbed(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients and compiled code; afterwards each module's own mode again, mixed as they may
    have been."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _eager():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _eager() -> AbstractContextManager[object]:
    """Leave a compiled model's compiled code aside: it would be compiled anew as the length grows.

    Only if the compiler was ever loaded; loading it takes over a second.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def check_prompts(
    model: Transformer, tokens: Tensor, max_new_tokens: int, padding: Tensor | None, source: Source | None
) -> None:
    """Raise ValueError for prompts that cannot be continued."""
    if model.config.family == "encoder":
        raise ValueError("model.family=encoder continues nothing: it fills masks; use llm.generate.fill_mask")
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
    if source is not None and len(source.tokens) != len(tokens):
        raise ValueError(f"source has {len(source.tokens)} rows and tokens {len(tokens)}: must be as many")
    if padding is not None and padding.shape != tokens.shape[:1]:
        raise ValueError(f"padding has shape {tuple(padding.shape)}: must be [{tokens.shape[0]}], one count a prompt")
    if padding is not None and not ((padding >= 0) & (padding < tokens.shape[1])).all():
        raise ValueError(
            f"padding = {padding.tolist()}: must leave each prompt of {tokens.shape[1]} tokens at least one of them"
        )


def _check_drawing(
    tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: must be at least 0 (greedy) and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1; leave it out to draw among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1; leave it out to draw among all tokens")
    if generator is not None and generator.device.type != tokens.device.type:
        raise ValueError(
            f"generator is on {generator.device}, tokens on {tokens.device}; "
            f"take torch.Generator(device={tokens.device.type!r})"
        )
