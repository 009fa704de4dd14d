"""Text <-> token ids, and which ids mean something of their own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
SENTINEL = "<extra_id_{}>"

# What ends a text, in the order we look for it: GPT and Llama families name it eos; BERT ends with its separator.
_END_KEYS = ("eos_token", "sep_token")
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


# Where a folder does not say which token is which.
_NAMES = {
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "pad_token": ("[PAD]", "<pad>"),
}
# Prefix, middle, suffix of fill-in-the-middle: ours and StarCoder's, Qwen's, Code Llama's.
FILL_IN_THE_MIDDLE = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
_FILL_IN_THE_MIDDLE = (
    FILL_IN_THE_MIDDLE,
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
)


class Tokenizer:
    """Encodes and decodes. It adds no special tokens, and finds none in a text: a source file that contains the literal
    `<|endoftext|>` gets the ids of those characters.

    `backend` is a `tokenizers.Tokenizer`; `config` what a Hugging Face tokenizer_config.json holds (the names of the
    special tokens, a chat template), kept so that it travels along with `save`.
    """

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        backend.no_truncation()  # some folders carry the limits of the model they were trained with
        backend.no_padding()
        # Some folders have markers among their ordinary tokens, which would be found in any text that names them.
        markers = [name for names in _FILL_IN_THE_MIDDLE for name in names if backend.token_to_id(name) is not None]
        known = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        backend.add_special_tokens([name for name in markers if name in known])
        backend.encode_special_tokens = True
        self.backend = backend
        self.config = config
        self.eot_id = self._end_of_text()
        pad = self._id("pad_token")
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

    def _id(self, key: str) -> int | None:
        """The id of a special token: the one the folder names, else the one its template for models puts around a text,
        else the one that is usually called so."""
        for name in (_name(self.config.get(key)), self._in_template(key), *_NAMES.get(key, ())):
            index = self.backend.token_to_id(name)
            if index is not None:
                return index
        return None

    def _in_template(self, key: str) -> str:
        """What roberta-base and bart-base call their cls_token and sep_token, and say nowhere else."""
        if key not in ("cls_token", "sep_token"):
            return ""
        template = self._description["post_processor"] or {}
        for part in template.get("processors", [template]):
            if part.get("type") in ("RobertaProcessing", "BertProcessing"):
                return str(part[key.removesuffix("_token")][0])
        return ""

    @property
    def cls_id(self) -> int | None:
        """What an encoder's text begins with, and what a pair is judged by."""
        return self._id("cls_token")

    @property
    def sep_id(self) -> int | None:
        """What ends each part of an encoder's text."""
        return self._id("sep_token")

    @property
    def mask_id(self) -> int | None:
        """What stands for a token that is to be guessed."""
        return self._id("mask_token")

    @property
    def start_id(self) -> int:
        """What comes before the first token of a text: bos_token (Llama), else the end of the one before (GPT-2)."""
        index = self._id("bos_token")
        return self.eot_id if index is None else index

    @cached_property
    def sentinel_ids(self) -> list[int]:
        """What stands for the first, second, … span that was cut out of a text (T5's <extra_id_0>, …)."""
        ids: list[int] = []
        while (index := self.backend.token_to_id(SENTINEL.format(len(ids)))) is not None:
            ids.append(index)
        return ids

    @cached_property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """What marks prefix, middle and suffix of a document whose middle comes last; None: there are none."""
        for names in _FILL_IN_THE_MIDDLE:
            prefix, middle, suffix = (self.backend.token_to_id(name) for name in names)
            if prefix is not None and middle is not None and suffix is not None:
                return prefix, middle, suffix
        return None

    @cached_property
    def special_ids(self) -> np.ndarray:
        """int64, rising: the ids that stand for no text."""
        added = self.backend.get_added_tokens_decoder()
        named = [self.eot_id, self.pad_id, self.cls_id, self.sep_id, self.mask_id, self.start_id]
        special = {index for index, token in added.items() if token.special} | {i for i in named if i is not None}
        return np.array(sorted(special), np.int64)

    @cached_property
    def has_words(self) -> bool:
        """Whether tokens make up words: not where every byte is one, nor where a text is cut straight into tokens."""
        split = self.backend.pre_tokenizer
        return not self._ids_are_bytes and split is not None and len(split.pre_tokenize_str("a b")) > 1

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
        return model.get("merges") == [] and model["vocab"] == {char: i for i, char in enumerate(byte_chars())}

    @cached_property
    def _encoder(self) -> Backend:
        """The backend, so guarded that no text gives a special token. A Unigram model holds T5's </s> as a piece like
        any other, of the highest score, and would find it: there, such a name is cut after its first character."""
        unknown = self.backend.token_to_id(_name(self.config.get("unk_token")) or "<unk>")
        special = {int(i): self.backend.id_to_token(int(i)) or "" for i in self.special_ids}
        forbidden = special.keys() - {unknown}
        found = self.backend.encode_batch([*special.values()], add_special_tokens=False)
        if not any(forbidden & set(encoding.ids) for encoding in found):
            return self.backend
        from tokenizers import Regex, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        guarded = Backend.from_str(self.backend.to_str())
        guarded.encode_special_tokens = True
        first = (f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in special.values() if len(name) > 1)
        cut = pre_tokenizers.Split(Regex("|".join(first)), "isolated")
        before = guarded.pre_tokenizer
        guarded.pre_tokenizer = pre_tokenizers.Sequence([cut] if before is None else [before, cut])
        return guarded

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text, on all cores (the library's own threads; it releases the GIL meanwhile)."""
        if self._ids_are_bytes:  # many times faster than asking the library
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, int64, with where in the text each token begins and ends: int64 [n, 2], in characters."""
        encodings = self._encoder.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            for encoding in encodings
        ]

    @cached_property
    def is_word_piece(self) -> bool:
        """Whether blanks between words are no part of tokens."""
        return self._description["model"].get("continuing_subword_prefix") == "##"

    def encode_words(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, with a bool array beside the tokens of each text: True where a token begins a word, that
        is, a piece that the tokenizer splits a text into before it looks for tokens. Needs `has_words`."""
        assert self.has_words, "bytes make up no words"
        result = []
        for encoding in self._encoder.encode_batch(texts, add_special_tokens=False):
            words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
            starts = np.diff(words, prepend=-2) != 0
            result.append((np.array(encoding.ids, np.uint32), starts))
        return result

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but the names of special tokens in the text ([MASK], <extra_id_0>) are those tokens: for what a
        person types, never for data."""
        added = {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        if not added:
            return self.encode(text)
        names = sorted(added, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if part in added:
                ids.append(added[part])
            elif part:
                ids += self._in_the_midst(part) if ids else self.encode(part)
        return ids

    def _in_the_midst(self, text: str) -> list[int]:
        """Tokens of what goes on behind other tokens: without the space that some tokenizers put before any text."""
        ids = self.encode(text)
        first = self.backend.id_to_token(ids[0]) if ids else None
        if first is None or not first.startswith("▁") or text[:1].isspace():
            return ids
        rest = self.backend.token_to_id(first[1:])
        return ids[1:] if first == "▁" else ids if rest is None else [rest, *ids[1:]]

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
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            if self.is_byte_level:
                sizes[index] = len(token)  # each byte is written as one character
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[index] = 1  # byte fallback
            elif self.is_word_piece:
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
        """Read what `save` wrote, any Hugging Face tokenizer folder, or the tokenizer within a GGUF file.

        Raises ValueError when there is no tokenizer, or one that has no `tokenizers` form.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        if folder.suffix == ".gguf":
            return cls._through_transformers(folder.parent, gguf_file=folder.name)
        file = folder / "tokenizer.json"
        if not file.is_file() and (folder / "source.spm").is_file():
            raise ValueError(
                f"tokenizer.path={folder}: Marian's two SentencePiece models (source.spm, target.spm) have no form for "
                "the tokenizers library; put a tokenizer.json beside them, or train one instead (tokenizer=unigram)"
            )
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
        return cls(backend, config or plain_config(None))

    @classmethod
    def _through_transformers(cls, folder: Path, **options: str) -> Tokenizer:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"tokenizer.path={folder}: has no tokenizer.json; other formats need `pip install transformers`"
            ) from None
        try:
            slow = AutoTokenizer.from_pretrained(folder, **options)
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

        config = plain_config(None) | {key: str(value) for key, value in slow.special_tokens_map.items()}
        if slow.chat_template is not None:
            config["chat_template"] = slow.chat_template
        return cls(Backend.from_str(backend.to_str()), config)


def _name(token: str | dict[str, Any] | None) -> str:
    """The text of a special token, which Hugging Face writes as a string or as {"content": ...}."""
    return (token.get("content", "") if isinstance(token, dict) else token) or ""


def plain_config(special: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config if special is None else config | dict.fromkeys(("bos_token", "eos_token", "pad_token"), special)


def byte_chars() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's: printable bytes are themselves)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
