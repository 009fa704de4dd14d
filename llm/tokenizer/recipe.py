"""What `conf/tokenizer` builds: byte-level BPE, WordPiece or Unigram trained on the data at hand, plain bytes, or the
tokenizer of any Hugging Face folder.

A recipe knows its `vocab_size` before any data is read, and `build(texts)` makes the `Tokenizer`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from llm.tokenizer.tokenizer import END_OF_TEXT, FILL_IN_THE_MIDDLE, SENTINEL, Tokenizer, byte_chars, plain_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# GPT-4's split (letters with one leading sign, digits by three, runs of punctuation) without its English
# contractions, and with one change: indentation stays with the line break or the punctuation before it, so that ":\n
# " can become one token. Held-out files of the standard library, vocabulary 4096: 3.66 bytes per token (GPT-2's split
# 3.32, GPT-4's 3.30) and the lowest bigram entropy per byte of the three (1.76 bits against 1.79 and 1.80).
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*(?=\S)|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Words with the space before them, digits one by one as T5's, signs, and what is left of spaces and line breaks.
UNIGRAM_SPLIT = r"▁?\p{L}+|▁?\p{N}|▁?[^\s\p{L}\p{N}▁]+|▁+|\s+"
# Characters a WordPiece vocabulary spells words with; rarer ones make a word [UNK].
_ALPHABET = 1000
# Its training takes half a minute for 10 million characters on one core.
_UNIGRAM_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class ByteLevelBPE:
    """Byte-level BPE (Radford et al. 2019) trained on the data at hand: 256 bytes, the special tokens, the rest merges.

    `vocab_size` is the most it can have: a text too small for so many merges gives fewer. `fill_in_the_middle` adds
    three special tokens, for prefix, middle and suffix (Bavarian et al. 2022, arXiv:2207.14255).
    """

    # 256 bytes and the end of text are always there.
    vocab_size: Annotated[int, Ge(257)] = 4096
    fill_in_the_middle: bool = False
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size}: 256 bytes and the end of text need at least 257")

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Train on `texts`, which are all held in memory: hand in a sample. Equal texts give equal tokenizers."""
        from tokenizers import Regex, models, pre_tokenizers, trainers

        backend = _byte_level(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT, *(FILL_IN_THE_MIDDLE if self.fill_in_the_middle else ())],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return Tokenizer(backend, plain_config(END_OF_TEXT))


@dataclass(frozen=True)
class WordPiece:
    """WordPiece (Schuster and Nakajima 2012; Devlin et al. 2019) trained on the data at hand, with BERT's rules for
    words and BERT's special tokens: [PAD] [UNK] [CLS] [SEP] [MASK] are ids 0 to 4.

    Spaces and, with `lowercase`, capitals and accents are lost. `vocab_size` is the most it can have.
    """

    vocab_size: Annotated[int, Ge(6)] = 4096
    lowercase: bool = True
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vocab_size < 6:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size}: five special tokens and text need at least 6")

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Train on `texts`, which are all held in memory: hand in a sample. Equal texts give equal tokenizers."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        special["mask_token"] = "[MASK]"
        normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        pieces = _word_pieces([normalizer.normalize_str(text) for text in texts], self.vocab_size - len(special))
        vocabulary = {piece: index for index, piece in enumerate([*special.values(), *pieces])}
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens(list(special.values()))
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
        segments = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        return Tokenizer(backend, plain_config(None) | special | segments)


@dataclass(frozen=True)
class Unigram:
    """A unigram language model of pieces (Kudo 2018, arXiv:1804.10959) trained on the data at hand, laid out as T5's:
    <pad> </s> <unk> are ids 0 to 2, and the `n_sentinels` that stand for spans come last, <extra_id_0> the very last.

    Runs of spaces survive; characters that the text did not hold, or so rarely that they would take more than half of
    the vocabulary, become <unk>. `vocab_size`, sentinels included, is the
    most it can have.
    """

    vocab_size: Annotated[int, Ge(8)] = 4096
    n_sentinels: Annotated[int, Ge(0)] = 100
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vocab_size < self.n_sentinels + 8:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size}: tokenizer.n_sentinels={self.n_sentinels} of these stand for "
                f"spans; give at least {self.n_sentinels + 8}, or fewer sentinels"
            )

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Train on `texts`, which are all held in memory: hand in a sample. Equal texts give equal tokenizers."""
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        normalizer, pre_tokenizer = (
            normalizers.NFKC(),
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
                    pre_tokenizers.Split(Regex(UNIGRAM_SPLIT), "isolated"),
                ]
            ),
        )
        backend = Backend(
            models.Unigram(
                _unigram_pieces(
                    texts, normalizer, pre_tokenizer, list(special.values()), self.vocab_size - self.n_sentinels
                ),
                unk_id=2,
            )
        )
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        backend.add_special_tokens(list(special.values()))
        sentinels = [SENTINEL.format(number) for number in reversed(range(self.n_sentinels))]
        backend.add_special_tokens(sentinels)
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
        return Tokenizer(backend, plain_config(None) | special)


@dataclass(frozen=True)
class Bytes:
    """Every UTF-8 byte is its own id (0-255), and 256 ends a text: no training, no vocabulary to carry."""

    needs_text: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        return 257

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        from tokenizers import models, pre_tokenizers

        backend = _byte_level(models.BPE(vocab={char: byte for byte, char in enumerate(byte_chars())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend, plain_config(END_OF_TEXT))


@dataclass(frozen=True)
class Pretrained:
    """The tokenizer of a Hugging Face folder (tokenizer.json, or what transformers turns into one), of a GGUF file, or
    of a run or step directory. Needs no weights."""

    path: str
    needs_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        path = Path(self.path).expanduser()
        if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
            raise ValueError(f"tokenizer.path={self.path}: no such folder; give one that holds a tokenizer.json")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = Path(self.path).expanduser()
        return Tokenizer.load(path / "tokenizer" if (path / "tokenizer" / "tokenizer.json").is_file() else path)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        return self._tokenizer


def _byte_level(model: Any) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders

    backend = Backend(model)
    backend.decoder = decoders.ByteLevel()
    return backend


def _word_pieces(texts: list[str], n_pieces: int) -> list[str]:
    """The characters of normalised texts, at the start of a word and, as `##c`, inside one, and the merges of byte-pair
    encoding, likeliest first.

    That is what the library's WordPieceTrainer does; but its choice among equals, and so every id, changes from one run
    to the next, which processes that build a tokenizer each for themselves cannot use.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    marked = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)  # ▁ is what begins a word
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), marked])
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=n_pieces, show_progress=False))
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:_ALPHABET]
    pieces = dict.fromkeys([*common, *(f"##{c}" for c in common)])
    merges = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    for token, _ in merges:
        word, inside = token.removeprefix("▁"), not token.startswith("▁")
        if word and set(word) <= set(common):
            pieces.setdefault(f"##{word}" if inside else word)
    return list(pieces)[:n_pieces]


def _unigram_pieces(
    texts: Iterable[str], normalizer: Any, pre_tokenizer: Any, special: list[str], n_pieces: int
) -> list[tuple[str, float]]:
    """(piece, log probability), special tokens first, then the likeliest first.

    The library adds probabilities up in the order in which threads finish, and numbers pieces in the order of a hash
    table. On one thread, with the noise rounded away and the pieces sorted, equal texts give equal ids.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    backend = Backend(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=n_pieces, special_tokens=special, unk_token=special[2], show_progress=False
    )
    with _one_thread():
        sample = [normalizer.normalize_str(text) for text in _first(texts, _UNIGRAM_CHARACTERS)]
        backend.train_from_iterator(_of_common_characters(sample, n_pieces // 2), trainer)
    trained = json.loads(backend.to_str())["model"]["vocab"]
    pieces = [(piece, round(score, 4)) for piece, score in trained if piece not in special]
    return [(name, 0.0) for name in special] + sorted(pieces, key=lambda item: (-item[1], item[0]))


def _first(texts: Iterable[str], n_characters: int) -> Iterator[str]:
    """Of every text its share of n_characters, so that all of them are heard."""
    kept = list(texts)
    share = min(1.0, n_characters / max(1, sum(map(len, kept))))
    for text in kept:
        yield text[: math.ceil(len(text) * share)]


def _of_common_characters(texts: list[str], n_characters: int) -> Iterator[str]:
    """The texts with a space for all but the commonest characters: the library refuses an alphabet that is larger than
    the vocabulary."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    rare = sorted(counts, key=lambda c: (-counts[c], c))[n_characters:]
    blank = str.maketrans(dict.fromkeys(rare, " "))
    for text in texts:
        yield text.translate(blank) if rare else text


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tokenizers library looks at this variable at each call."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
