"""Beam search: the likeliest text rather than the likeliest next token.

Shapes: B prompts, N beams, T length so far, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.generate.decode import as_chosen, check_prompts, place, undisturbed
from llm.model.cache import Cache
from llm.model.transformer import Source, Transformer


def length_penalty(length: int, alpha: float) -> float:
    """What the log-probability of `length` new tokens is divided by (Wu et al. 2016, arXiv:1609.08144, section 7)."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    n_beams: int,
    alpha: float = 0.6,
    eos_id: int | None = None,
    padding: Tensor | None = None,
    source: Source | None = None,
    agree: Callable[[Tensor], Tensor] = as_chosen,
) -> Tensor:
    """Prompts and the best text found behind each: int64 [B, T] -> [B, T + n], n <= max_new_tokens.

    At every step each prompt keeps the `n_beams` likeliest texts that go on. One that ends among the `n_beams` best is
    set aside with its score, log-probability / length_penalty, eos_id counted as a token. A text that fills the length
    is scored as it stands. The search of a prompt ends when no text that goes on can still become better than the best
    one set aside, even if all its further tokens were certain: ending early changes no result.

    alpha    0 compares log-probabilities, which favours short texts; larger favours longer ones
    eos_id   ends a text; rows that end before others are filled with it

    Other arguments and the model's state as in `generate`. Raises ValueError for what `generate` refuses, for fewer
    than one beam and for a negative alpha.
    """
    check_prompts(model, tokens, max_new_tokens, padding, source)
    if n_beams < 1:
        raise ValueError(f"n_beams = {n_beams}: must be at least 1")
    if alpha < 0:
        raise ValueError(f"alpha = {alpha}: must be at least 0; 0 takes the likeliest text whatever its length")
    length = tokens.shape[1]
    end = min(length + max_new_tokens, model.config.max_length)
    search = _Search(tokens, n_beams, end - length, alpha, eos_id)
    cache = Cache(model.config.decoder_layers, end)
    documents, positions = place(tokens, padding)
    with undisturbed(model):
        logits = model.logits(model(tokens, documents, positions, cache, source=source)[:, -1])
        # Prompts and sources are read once, then every beam gets its copy.
        rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(n_beams)
        cache.select(rows)
        logits = logits[rows]
        if documents is not None and positions is not None:
            documents, positions = torch.ones_like(rows).unsqueeze(1), positions[rows, -1:]
        while True:
            rows, new = search.step(logits, agree)
            if search.done():
                return torch.cat((tokens, search.best()), dim=1)
            cache.select(rows)
            positions = None if positions is None else positions[rows] + 1
            logits = model.logits(model(new, documents, positions, cache)[:, -1])


class _Search:
    """The texts of all beams, and the best that have ended."""

    def __init__(self, prompts: Tensor, n_beams: int, n_steps: int, alpha: float, eos_id: int | None) -> None:
        batch, device = len(prompts), prompts.device
        self.n_beams, self.n_steps, self.alpha, self.eos_id = n_beams, n_steps, alpha, eos_id
        self.first = torch.arange(batch, device=device).unsqueeze(1) * n_beams  # row of each prompt's first beam
        self.texts = prompts.new_zeros(batch * n_beams, 0)  # [B N, length]
        # All beams begin alike: one of them goes on.
        self.scores = torch.full((batch, n_beams), -torch.inf, device=device)  # log-probabilities
        self.scores[:, 0] = 0.0
        self.ended_score = torch.full((batch,), -torch.inf, device=device)
        self.ended = prompts.new_full((batch, n_steps), 0 if eos_id is None else eos_id)  # [B, n_steps]
        self.ended_length = prompts.new_zeros(batch)

    def step(self, logits: Tensor, agree: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """One more token: logits [B N, V] -> the row that each beam goes on from [B N], and its new token [B N, 1]."""
        n_vocabulary = logits.shape[-1]
        # A diverged model gives noise, as when drawing: NaN has no order.
        scores = torch.nan_to_num(logits.float()).log_softmax(-1).unflatten(0, (-1, self.n_beams))
        scores = (scores + self.scores.unsqueeze(-1)).flatten(1)  # [B, N V]
        # Of twice as many at least n_beams do not end.
        scores, chosen = scores.topk(min(2 * self.n_beams, scores.shape[1]), dim=1)
        scores, chosen = agree(scores), agree(chosen)
        rows, new = self.first + chosen // n_vocabulary, chosen % n_vocabulary  # [B, 2N] both
        length = self.texts.shape[1] + 1
        if self.eos_id is not None:
            ending = new == self.eos_id
            among_best = ending[:, : self.n_beams]
            self._set_aside(scores[:, : self.n_beams].masked_fill(~among_best, -torch.inf), rows, new, length)
            scores = scores.masked_fill(ending, -torch.inf)
        if scores.shape[1] < self.n_beams:  # a vocabulary of one
            raise ValueError(f"n_beams = {self.n_beams}: the vocabulary is too small for so many")
        self.scores, kept = scores.topk(self.n_beams, dim=1)
        rows, new = rows.gather(1, kept), new.gather(1, kept)
        if length == self.n_steps:
            self._set_aside(self.scores, rows, new, length)
        self.texts = torch.cat((self.texts[rows.flatten()], new.flatten().unsqueeze(1)), dim=1)
        return rows.flatten(), new.flatten().unsqueeze(1)

    def _set_aside(self, scores: Tensor, rows: Tensor, new: Tensor, length: int) -> None:
        """Keep, for each prompt, the best text of those that end here if it is better than the one kept."""
        score, which = (scores / length_penalty(length, self.alpha)).max(dim=1, keepdim=True)
        score = score.squeeze(1)
        better = score > self.ended_score
        texts = torch.cat((self.texts[rows.gather(1, which).squeeze(1)], new.gather(1, which)), dim=1)
        self.ended[:, :length] = torch.where(better.unsqueeze(1), texts, self.ended[:, :length])
        self.ended_length = torch.where(better, length, self.ended_length)
        self.ended_score = torch.where(better, score, self.ended_score)

    def done(self) -> bool:
        """Whether no beam of any prompt can end better: its log-probability only falls, the penalty is largest last."""
        if self.texts.shape[1] == self.n_steps:
            return True
        hope = self.scores.max(dim=1).values / length_penalty(self.n_steps, self.alpha)
        return bool((self.ended_score >= hope).all())

    def best(self) -> Tensor:
        """The best text of each prompt: [B, n]."""
        return self.ended[:, : int(self.ended_length.max())]
