"""What a document becomes: text to go on with, to fill in, to restore.

A task is a config node; llm/data/example.py does what it says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Interval, Lt

from llm.data.source import DataError, check_weight
from llm.tokenizer import Tokenizer

_SHORTEST_PAIR = 11  # [CLS] a [SEP] b [SEP], with some tokens on both sides
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class Widths:
    """Positions in a row: of a decoder's or an encoder's tokens, and on the decoder's side of an encoder-decoder."""

    row: int
    target: int


class Task(ABC):
    """How runs of a document's tokens are laid out in a row.

    `family` says whose rows they are. `weight` is the task's share in a mixture, counted in tokens, as a source's.
    """

    family: ClassVar[str]
    weight: float
    needs_words: ClassVar[bool] = False

    def check(self, name: str, tokenizer: Tokenizer) -> None:
        """Raise DataError if the tokenizer lacks what the task writes."""
        return  # every tokenizer has an end of text

    @abstractmethod
    def longest(self, widths: Widths) -> int:
        """Tokens of the longest piece that fits into a row; longer documents are cut. Less than 1: none fits."""

    @abstractmethod
    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        """Positions of a row of `widths.row` that pieces of `lengths` tokens take (int64): they fit if the sum does."""

    def used(self, lengths: np.ndarray) -> tuple[int, int]:
        """Positions that pieces of `lengths` tokens fill, and those of the decoder's side if that is another one."""
        return int(lengths.sum()), 0

    def target_width(self, row: int) -> int:
        """What the decoder's side of a row comes to, where it is not given; 0 for tasks without one."""
        return 0

    def check_row(self, name: str, widths: Widths, tokenizer: Tokenizer) -> None:
        """Raise DataError if a row is of no use: too short, or longer than the tokenizer has symbols for."""
        if self.longest(widths) < 1:
            raise DataError(f"data.max_length={widths.row}: has no room for what data.tasks.{name} writes; raise it")


@dataclass(frozen=True)
class NextToken(Task):
    """Each token from those before it (Radford et al. 2018): a piece of n tokens has n inputs and n labels."""

    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def longest(self, widths: Widths) -> int:
        return widths.row

    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        return lengths


@dataclass(frozen=True)
class FillInTheMiddle(Task):
    """Next tokens of documents of which a share, `rate`, has its middle moved to the end (Bavarian et al. 2022,
    arXiv:2207.14255, section 3): prefix, suffix, middle or, for `spm_rate` of these, suffix, prefix, middle. Cuts fall
    between tokens. Which documents, and where they are cut, is drawn anew in each epoch.
    """

    rate: Share = 0.5
    spm_rate: Share = 0.5
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "decoder"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_shares("fill_in_the_middle", rate=self.rate, spm_rate=self.spm_rate)

    def check(self, name: str, tokenizer: Tokenizer) -> None:
        if tokenizer.fim_ids is None:
            raise DataError(
                f"data.tasks.{name}: the tokenizer has no tokens for prefix, middle and suffix; "
                "take tokenizer=bpe tokenizer.fill_in_the_middle=true"
            )

    def longest(self, widths: Widths) -> int:
        return widths.row - 3

    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        return lengths + 3


@dataclass(frozen=True)
class Masking(Task):
    """Hidden tokens from all around them (Devlin et al. 2019, arXiv:1810.04805): `rate` of a piece's tokens are to be
    predicted; of these the share `mask` is shown as [MASK], `random` as any other token, and the rest as they are.

    whole_word     hides all tokens of a word or none
    next_sentence  pieces are pairs, the second part following the first in the document or, for half of them, taken
                   from another document; drawn once, in `n_copies` of the text
    """

    rate: Annotated[float, Gt(0), Lt(1)] = 0.15
    mask: Share = 0.8
    random: Share = 0.1
    whole_word: bool = False
    next_sentence: bool = False
    n_copies: Annotated[int, Ge(1)] = 4
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "encoder"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_shares("masked_lm", mask=self.mask, random=self.random)
        if not 0 < self.rate < 1:
            raise ValueError(f"data.tasks.masked_lm.rate={self.rate}: must be above 0 and below 1; BERT's is 0.15")
        if self.mask + self.random > 1:
            raise ValueError(
                f"data.tasks.masked_lm.mask={self.mask}: with random={self.random} more than all; "
                "the two must add up to at most 1"
            )

    @property
    def needs_words(self) -> bool:  # type: ignore[override]
        """Whether the tokens are stored with where words begin."""
        return self.whole_word

    def check(self, name: str, tokenizer: Tokenizer) -> None:
        wanted = {"[CLS]": tokenizer.cls_id, "[SEP]": tokenizer.sep_id, "[MASK]": tokenizer.mask_id}
        missing = [token for token, index in wanted.items() if index is None]
        if missing:
            raise DataError(
                f"data.tasks.{name}: the tokenizer has no {' and no '.join(missing)}; take tokenizer=wordpiece, or "
                "tokenizer=pretrained with an encoder's"
            )
        if self.whole_word and not tokenizer.has_words:
            raise DataError(f"data.tasks.{name}.whole_word: the tokenizer knows bytes, not words; set it to false")

    def longest(self, widths: Widths) -> int:
        return widths.row - 2

    def check_row(self, name: str, widths: Widths, tokenizer: Tokenizer) -> None:
        super().check_row(name, widths, tokenizer)
        if self.next_sentence and widths.row < _SHORTEST_PAIR:
            raise DataError(
                f"data.max_length={widths.row}: a pair with its special tokens needs {_SHORTEST_PAIR}; raise it, or "
                f"set data.tasks.{name}.next_sentence=false"
            )

    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        return lengths + 2

    def used(self, lengths: np.ndarray) -> tuple[int, int]:
        return int(lengths.sum()) + 2 * len(lengths), 0


@dataclass(frozen=True)
class SpanDenoising(Task):
    """Spans cut out of a text, from the rest (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): `rate` of a piece's
    tokens in spans of `mean_span` on average. The source has a sentinel in the place of each span, the target the
    spans, each after its sentinel; both end with end-of-text.
    """

    rate: Annotated[float, Gt(0), Lt(1)] = 0.15
    mean_span: Annotated[float, Ge(1)] = 3.0
    weight: Annotated[float, Gt(0)] = 1.0
    family: ClassVar[str] = "encoder_decoder"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not 0 < self.rate < 1:
            raise ValueError(f"data.tasks.span_denoising.rate={self.rate}: must be above 0 and below 1; T5's is 0.15")
        if self.mean_span < 1:
            raise ValueError(f"data.tasks.span_denoising.mean_span={self.mean_span}: must be at least 1; T5's is 3")

    def check(self, name: str, tokenizer: Tokenizer) -> None:
        if not tokenizer.sentinel_ids:
            raise DataError(
                f"data.tasks.{name}: the tokenizer has no sentinels (<extra_id_0> …) to stand for spans; "
                "take tokenizer=unigram, or tokenizer=pretrained with a T5's"
            )

    def used(self, lengths: np.ndarray) -> tuple[int, int]:
        source, target = self.sizes(lengths)
        return int(source.sum()), int(target.sum())

    def check_row(self, name: str, widths: Widths, tokenizer: Tokenizer) -> None:
        if self.longest(widths) < 2:
            raise DataError(
                f"data.max_length={widths.row}, data.target_length={widths.target}: no room for a text with a span cut "
                f"out (data.tasks.{name}); raise them, or leave the second null"
            )
        _, n_spans = self.counts(np.array([self.longest(widths)]))
        if n_spans[0] > len(tokenizer.sentinel_ids):
            raise DataError(
                f"data.tasks.{name}: data.max_length={widths.row} makes {n_spans[0]} spans, the tokenizer "
                f"has {len(tokenizer.sentinel_ids)} sentinels; shorten rows, raise mean_span or tokenizer.n_sentinels"
            )

    def counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens cut out of pieces of `lengths` >= 2 tokens, and in how many spans: at least 1, and never all."""
        n_noise = np.clip(np.round(lengths * self.rate).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        n_spans = np.maximum(np.round(n_noise / self.mean_span).astype(np.int64), 1)
        return n_noise, np.minimum(n_spans, np.maximum(lengths - n_noise, 1))

    def sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions that pieces take in the source and in the target: they follow from the length alone."""
        n_noise, n_spans = self.counts(lengths)
        return lengths - n_noise + n_spans + 1, n_noise + n_spans + 1

    def longest(self, widths: Widths) -> int:
        lengths = np.arange(1, 2 * widths.row + 2)
        fits = self.cost(lengths, widths) <= widths.row
        return int(lengths[fits][-1]) if fits.any() else 0

    def cost(self, lengths: np.ndarray, widths: Widths) -> np.ndarray:
        """The larger share of the two sides: what fits by it fits on both."""
        source, target = self.sizes(lengths)
        return np.maximum(source, -(-target * widths.row // widths.target))

    def target_width(self, row: int) -> int:
        """The target of the longest piece whose source fits, as T5 chose 114 for 512."""
        lengths = np.arange(1, 2 * row + 2)
        source, target = self.sizes(lengths)
        fitting = target[source <= row]
        return int(fitting[-1]) if len(fitting) else row


def _check_shares(task: str, **shares: float) -> None:
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"data.tasks.{task}.{key}={share}: is a share; must be from 0 to 1")
