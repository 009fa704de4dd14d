"""Text <-> token ids: byte-level BPE trained here, plain bytes, or any Hugging Face tokenizer folder.

A *recipe* (`ByteLevelBPE`, `Bytes`, `Pretrained`) is a config node: it knows its `vocab_size` before any data is
read, and `build(texts)` makes the `Tokenizer`. Importing this module loads neither torch nor tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"

# GPT-4's split (letters with one leading sign, digits by three, runs of punctuation) without its English
# contractions, and with one change: indentation stays with the line break or the punctuation before it, so that ":\n
# " can become one token. Held-out files of the standard library, vocabulary 4096: 3.66 bytes per token (GPT-2's split
# 3.32, GPT-4's 3.30) and the lowest bigram entropy per byte of the three (1.76 bits against 1.79 and 1.80).
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*(?=\S)|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What ends a text, in the order we look for it: GPT and Llama families name it eos; BERT ends with its separator.
_END_KEYS = ("eos_token", "sep_token")
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class ByteLevelBPE:
    """Byte-level BPE (Radford et al. 2019) trained on the data at hand: 256 bytes, one special token, the rest merges.

    `vocab_size` is the most it can have: a text too small for so many merges gives fewer.
    """

    # 256 bytes and the end of text are always there.
    vocab_size: Annotated[int, Ge(257)] = 4096
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
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return Tokenizer(backend, _config(END_OF_TEXT))


@dataclass(frozen=True)
class Bytes:
    """Every UTF-8 byte is its own id (0-255), and 256 ends a text: no training, no vocabulary to carry."""

    needs_text: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        return 257

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        from tokenizers import models, pre_tokenizers

        backend = _byte_level(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend, _config(END_OF_TEXT))


@dataclass(frozen=True)
class Pretrained:
    """The tokenizer of a Hugging Face folder: tokenizer.json, or what transformers turns into one. Needs no weights."""

    path: str
    needs_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not Path(self.path).expanduser().is_dir():
            raise ValueError(f"tokenizer.path={self.path}: no such folder; give one that holds a tokenizer.json")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(Path(self.path).expanduser())

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        return self._tokenizer


class Tokenizer:
    """Encodes and decodes. It adds no special tokens, and finds none in a text: a source file that contains the literal
    `<|endoftext|>` gets the ids of those characters.

    `backend` is a `tokenizers.Tokenizer`; `config` what a Hugging Face tokenizer_config.json holds (the names of the
    special tokens, a chat template), kept so that it travels along with `save`.
    """

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        backend.no_truncation()  # some folders carry the limits of the model they were trained with
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.config = config
        self.eot_id = self._end_of_text()
        pad = backend.token_to_id(_name(config.get("pad_token")))
        self.pad_id: int = self.eot_id if pad is None else pad

    def _end_of_text(self) -> int:
        for name in [*(_name(self.config.get(key)) for key in _END_KEYS), *_END_NAMES]:
            index = self.backend.token_to_id(name)
            if index is not None:
                return index
        raise ValueError(
            "tokenizer: no token that ends a text; name one as eos_token in tokenizer_config.json "
            f"(looked for {', '.join(_END_KEYS)} and {', '.join(_END_NAMES)})"
        )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (a vocabulary may have holes)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token is a run of bytes: any text then survives encode and decode; `token_bytes` is exact."""
        decoder = self._description["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        return any(part.get("type") == "ByteLevel" for part in parts) and self._description["normalizer"] is None

    @cached_property
    def _ids_are_bytes(self) -> bool:
        model = self._description["model"]
        return model.get("merges") == [] and model["vocab"] == {char: i for i, char in enumerate(_byte_chars())}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text, on all cores (the library's own threads; it releases the GIL meanwhile)."""
        if self._ids_are_bytes:  # many times faster than asking the library
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a character cut in two) come out as U+FFFD."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else [int(index) for index in ids]
        return self.backend.decode(plain, skip_special_tokens=skip_special)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each id stands for, 0 for special tokens.

        Exact when `is_byte_level`. Elsewhere an estimate: text that the normalizer drops is not seen, and a WordPiece
        token that starts a word counts the space before it.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        word_piece = self._description["model"].get("continuing_subword_prefix") == "##"
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            if self.is_byte_level:
                sizes[index] = len(token)  # each byte is written as one character
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[index] = 1  # byte fallback
            elif word_piece:
                sizes[index] = len(token.removeprefix("##").encode()) + (not token.startswith("##"))
            else:
                sizes[index] = len(token.replace("▁", " ").encode())
        for index, added in self.backend.get_added_tokens_decoder().items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.backend.to_str()} {self.eot_id} {self.pad_id}".encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: `load` and transformers' AutoTokenizer both read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what `save` wrote, or any Hugging Face tokenizer folder.

        Raises ValueError when the folder holds no tokenizer, or one that has no `tokenizers` form.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            return cls._through_transformers(folder)
        try:
            backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: not a tokenizer that the tokenizers library reads ({error})") from None
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
            if (folder / name).is_file():
                config |= json.loads((folder / name).read_text(encoding="utf-8"))
        return cls(backend, config or _config(None))

    @classmethod
    def _through_transformers(cls, folder: Path) -> Tokenizer:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"tokenizer.path={folder}: has no tokenizer.json; other formats need `pip install transformers`"
            ) from None
        try:
            slow = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"tokenizer.path={folder}: transformers finds no tokenizer in it ({reason})") from None
        backend = getattr(slow, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer.path={folder}: {type(slow).__name__} has no form for the tokenizers library; "
                "convert it to a tokenizer.json first"
            )
        from tokenizers import Tokenizer as Backend

        config = _config(None) | {key: str(value) for key, value in slow.special_tokens_map.items()}
        return cls(Backend.from_str(backend.to_str()), config)


def _name(token: str | dict[str, Any] | None) -> str:
    """The text of a special token, which Hugging Face writes as a string or as {"content": ...}."""
    return (token.get("content", "") if isinstance(token, dict) else token) or ""


def _config(special: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config if special is None else config | dict.fromkeys(("bos_token", "eos_token", "pad_token"), special)


def _byte_level(model: Any) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders

    backend = Backend(model)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_chars() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's: printable bytes are themselves)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
