"""Pieces of text as tasks show them: masked, cut into spans, with the middle last. Pure functions of a generator.

n tokens of a piece are one int64 array, without ends of text unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm.data.task import FillInTheMiddle, Masking, SpanDenoising
from llm.tokenizer import Tokenizer

IGNORED = -100  # a label that is not predicted, as in torch's cross entropy
Fields = dict[str, np.ndarray]  # name -> one value for each position of a piece


@dataclass(frozen=True)
class Symbols:
    """The ids that tasks write; None where the tokenizer has no such token."""

    pad: int
    end: int
    cls: int | None
    sep: int | None
    mask: int | None
    sentinels: np.ndarray  # int64
    fim: tuple[int, int, int] | None  # prefix, middle, suffix
    ordinary: np.ndarray  # int64, what may stand in the place of a hidden token

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Symbols:
        ids = np.array(sorted(tokenizer.backend.get_vocab(with_added_tokens=True).values()), np.int64)
        ordinary = np.setdiff1d(ids, tokenizer.special_ids)  # a vocabulary may have holes
        return cls(
            tokenizer.pad_id,
            tokenizer.eot_id,
            tokenizer.cls_id,
            tokenizer.sep_id,
            tokenizer.mask_id,
            np.array(tokenizer.sentinel_ids, np.int64),
            tokenizer.fim_ids,
            ordinary,
        )


def generator(seed: int, source: int, epoch: int, row: int) -> np.random.Generator:
    """Where the noise of one row in one epoch comes from, whoever asks for it."""
    return np.random.default_rng((seed & 0xFFFFFFFFFFFFFFFF, source, epoch, row))


def fill_in_the_middle(text: np.ndarray, task: FillInTheMiddle, symbols: Symbols, draw: np.random.Generator) -> Fields:
    """A piece of next-token text, n + 1 stored tokens, as n or n + 3 inputs and labels.

    The first stored token is only an input, and an end of text at the end stays there.
    """
    first, rest = text[:1], text[1:]
    if symbols.fim is None or draw.random() >= task.rate:
        return {"tokens": text[:-1], "labels": rest}
    ended = len(rest) > 0 and rest[-1] == symbols.end
    body, end = (rest[:-1], rest[-1:]) if ended else (rest, rest[:0])
    cuts = np.sort(draw.integers(0, len(body) + 1, 2))
    before, middle, after = body[: cuts[0]], body[cuts[0] : cuts[1]], body[cuts[1] :]
    prefix_id, middle_id, suffix_id = (np.array([index]) for index in symbols.fim)
    if draw.random() < task.spm_rate:
        parts = [prefix_id, suffix_id, after, middle_id, before, middle, end]
    else:
        parts = [prefix_id, before, suffix_id, after, middle_id, middle, end]
    moved = np.concatenate(parts)
    return {"tokens": np.concatenate([first, moved[:-1]]), "labels": moved}


def hide(
    tokens: np.ndarray, words: np.ndarray | None, task: Masking, symbols: Symbols, draw: np.random.Generator
) -> Fields:
    """n tokens with some hidden, and the labels of those. `words`, bool [n], is where words begin, the first token too:
    they are hidden whole.

    As many as `task.rate` of them to the nearest whole, at least one; of whole words as many as fit into that, at least
    one word.
    """
    n_hidden = max(1, round(len(tokens) * task.rate))
    if words is None:
        hidden = draw.permutation(len(tokens))[:n_hidden]
    else:
        word = np.cumsum(words) - 1
        sizes = np.bincount(word).tolist()
        order = draw.permutation(len(sizes)).tolist()
        chosen, room = order[:1], n_hidden - sizes[order[0]]
        for candidate in order[1:]:
            if sizes[candidate] <= room:
                chosen.append(candidate)
                room -= sizes[candidate]
        hidden = np.flatnonzero(np.isin(word, chosen))
    shown, labels = tokens.copy(), np.full(len(tokens), IGNORED)
    labels[hidden] = tokens[hidden]
    how = draw.random(len(hidden))
    shown[hidden[how < task.mask]] = symbols.mask
    other = hidden[(how >= task.mask) & (how < task.mask + task.random)]
    shown[other] = draw.choice(symbols.ordinary, len(other))
    return {"tokens": shown, "labels": labels}


def enclosed(parts: Sequence[np.ndarray], cls: int | None, sep: int | None) -> Fields:
    """`tokens`: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; `segments`: which part each is of (Devlin et al. 2019)."""
    assert cls is not None and sep is not None, "a task for an encoder checks that its tokenizer has both"  # noqa: PT018
    tokens, segments = [np.array([cls])], [np.array([0])]
    for segment, part in enumerate(parts):
        tokens += [part, np.array([sep])]
        segments.append(np.full(len(part) + 1, segment))
    return {"tokens": np.concatenate(tokens).astype(np.int64), "segments": np.concatenate(segments)}


def cut_spans(
    tokens: np.ndarray, task: SpanDenoising, symbols: Symbols, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A source with sentinels in the place of spans, and a target with the spans, both ending with end-of-text.

    Kept and cut runs take turns, a kept one first, their lengths drawn as Raffel et al.'s `random_spans_noise_mask`
    does: every way to cut the total into so many runs is as likely.
    """
    n_noise, n_spans = (int(count[0]) for count in task.counts(np.array([len(tokens)])))
    kept = _runs(len(tokens) - n_noise, n_spans, draw)
    cut = _runs(n_noise, n_spans, draw)
    ends = np.cumsum(np.stack((kept, cut), axis=1))  # of kept run 0, cut run 0, kept run 1, …
    runs = np.split(tokens, ends[:-1])
    sentinels = symbols.sentinels[:n_spans, None]
    end = np.array([symbols.end])
    source = [part for run, sentinel in zip(runs[::2], sentinels, strict=True) for part in (run, sentinel)]
    target = [part for run, sentinel in zip(runs[1::2], sentinels, strict=True) for part in (sentinel, run)]
    return np.concatenate([*source, end]), np.concatenate([*target, end])


def _runs(total: int, n_runs: int, draw: np.random.Generator) -> np.ndarray:
    """`total` cut into runs of at least 1; where there are too few, the first have 0."""
    if total < n_runs:
        return np.concatenate([np.zeros(n_runs - total, np.int64), np.ones(total, np.int64)])
    cuts = np.sort(draw.permutation(total - 1)[: n_runs - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def laid_out(pieces: list[Fields], width: int, padding: dict[str, int], document_mask: bool) -> Fields:
    """Pieces one after the other in `width` positions, with `documents` 1, 2, … (0 behind them) and `positions`."""
    sizes = [len(piece["tokens"]) for piece in pieces]
    filled = sum(sizes)
    assert filled <= width, f"{filled} positions do not fit into {width}"
    row = {}
    for name, value in padding.items():
        row[name] = np.full(width, value, np.int64)
        if pieces:
            row[name][:filled] = np.concatenate([piece[name] for piece in pieces])
    row["documents"], row["positions"] = np.zeros(width, np.int64), np.zeros(width, np.int64)
    if document_mask:
        row["documents"][:filled] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        row["positions"][:filled] = np.concatenate([np.arange(size) for size in sizes]) if sizes else 0
    else:
        row["documents"][:filled], row["positions"] = 1, np.arange(width)
    return row
