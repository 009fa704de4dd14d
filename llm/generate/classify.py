"""Labels for texts, and answers within them, by an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm.generate.decode import undisturbed
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer


class Window(Protocol):
    """A part of a context beside its question: `llm.data.labelling.Window`."""

    @property
    def fields(self) -> Mapping[str, np.ndarray]: ...

    @property
    def first(self) -> int: ...

    @property
    def offsets(self) -> np.ndarray: ...


class Reader(Protocol):
    """What the task of question answering says: `llm.data.ExtractSpan`."""

    @property
    def longest_answer(self) -> int: ...

    @property
    def no_answer(self) -> bool: ...

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[Any]: ...

    def windows(self, encoded: list[Any], max_length: int, tokenizer: Tokenizer) -> Sequence[Window]: ...


def label_scores(
    model: Transformer, shown: Sequence[Mapping[str, np.ndarray]], pad_id: int, batch_size: int = 32
) -> list[Tensor]:
    """The scores of the labels, before any softmax, for each text: of a classifier of texts [1, labels], of one of
    tokens [n, labels]; float32 on the CPU. Texts of like length share a batch.

    Args:
        shown: `tokens` and `segments` of each text, what encloses it included.
    """
    order = sorted(range(len(shown)), key=lambda index: len(shown[index]["tokens"]))
    found: list[Tensor] = [torch.empty(0)] * len(shown)
    device = model.embed.weight.device
    with undisturbed(model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            sizes = [len(shown[index]["tokens"]) for index in batch]

            def padded(name: str, filler: int, batch: list[int] = batch, width: int = max(sizes)) -> Tensor:
                rows = [shown[index][name] for index in batch]
                wide = [np.pad(row, (0, width - len(row)), constant_values=filler) for row in rows]
                return torch.from_numpy(np.stack(wide)).to(device)

            tokens = padded("tokens", pad_id)
            real = (torch.arange(tokens.shape[1]) < torch.tensor(sizes).unsqueeze(1)).long().to(device)
            segments = padded("segments", 0) if model.config.n_segments else None
            hidden = model(tokens, documents=real, segments=segments)
            scores = model.label_logits(hidden[:, :1] if model.config.label_of == "text" else hidden).float().cpu()
            for index, of_text, size in zip(batch, scores, sizes, strict=True):
                found[index] = of_text[:size]
    return found


def extract(
    model: Transformer, tokenizer: Tokenizer, task: Reader, reads: Sequence[Any], batch_size: int = 32
) -> list[str]:
    """The answer to each question, a part of its context: the likeliest span of all windows. With `no_answer` it is
    the empty text where the first token, which stands for that, is likelier in every window (Devlin et al. 2019, 4.3).

    Args:
        reads: questions and contexts, as `texts`.
    """
    windows = [task.windows(task.encode(read.texts, tokenizer), model.config.max_length, tokenizer) for read in reads]
    flat = [window for several in windows for window in several]
    scores = iter(label_scores(model, [window.fields for window in flat], tokenizer.pad_id, batch_size))
    answers = []
    for read, several in zip(reads, windows, strict=True):
        best, nothing, answer = -float("inf"), float("inf"), ""
        for window in several:
            found = next(scores)
            nothing = min(nothing, float(found[0].sum()))
            if not len(window.offsets):  # a context of which its tokenizer makes nothing
                continue
            score, start, end = best_span(found[window.first : window.first + len(window.offsets)], task.longest_answer)
            if score > best:
                best, answer = score, read.texts[1][int(window.offsets[start, 0]) : int(window.offsets[end, 1])]
        answers.append("" if task.no_answer and nothing > best else answer)
    return answers


def best_span(scores: Tensor, longest: int) -> tuple[float, int, int]:
    """The span of at most `longest` tokens whose start and end score most together: [n, 2] -> score, first, last."""
    both = scores[:, :1] + scores[:, 1].unsqueeze(0)  # [start, end]
    allowed = torch.ones_like(both, dtype=torch.bool).triu().tril(longest - 1)
    both = both.masked_fill(~allowed, -torch.inf)
    at = int(both.argmax())
    return float(both.flatten()[at]), at // len(both), at % len(both)
