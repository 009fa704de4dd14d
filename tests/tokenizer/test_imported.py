"""Folders of every family that is imported: what their special tokens mean, though few say so in so many words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.tokenizer import Tokenizer, WordPiece

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["hello world, the quick fox"] * 9


def save(backend: Any, folder: Path, config: dict[str, Any]) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def byte_level(special: list[str]) -> Any:
    """RoBERTa's, BART's and ModernBERT's kind."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = split, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=split.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def t5(n_sentinels: int) -> Any:
    """As t5-base has it: special tokens are pieces of the model too, with the highest score, and `<` is unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("b", -3.0), ("s", -3.0)]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(n_sentinels))]
    pieces += [(name, 0.0) for name in sentinels]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    spaces = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    split = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, spaces])
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    return backend


@pytest.mark.parametrize("nested", [False, True])
def test_roberta_and_bart_name_their_tokens_in_the_template_alone(nested: bool, tmp_path: Path) -> None:
    backend = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    template = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.post_processor = tokenizers.processors.Sequence([template]) if nested else template
    tokenizer = save(backend, tmp_path, {"model_max_length": 512})
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 4)
    assert (tokenizer.pad_id, tokenizer.eot_id) == (1, 2)
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]
    ((ids, starts),) = tokenizer.encode_words(["the quick fox"])
    assert starts.sum() == 3
    assert tokenizer.decode(ids[np.flatnonzero(starts)[1] :]) == " quick fox"


def test_modernbert_is_byte_level_with_the_names_of_bert(tmp_path: Path) -> None:
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = save(byte_level([*names.values(), "[MASK]"]), tmp_path, names | {"mask_token": {"content": "[MASK]"}})
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id) == (1, 2, 3, 4)
    assert tokenizer.eot_id == 2
    assert tokenizer.has_words


def test_t5_has_its_sentinels_and_finds_no_special_token_in_a_text(tmp_path: Path) -> None:
    tokenizer = save(t5(3), tmp_path, {"eos_token": "</s>", "unk_token": "<unk>"})
    assert (tokenizer.pad_id, tokenizer.eot_id, tokenizer.cls_id, tokenizer.mask_id) == (0, 1, None, None)
    assert tokenizer.sentinel_ids == [9, 8, 7]
    special = set(tokenizer.special_ids.tolist()) - {2}
    for text in ("a </s> b", "a</s>", "<extra_id_0>", "b<extra_id_2> <pad>"):
        ids = tokenizer.encode(text)
        assert not special & set(ids)
        assert tokenizer.encode_words([text])[0][0].tolist() == ids
    assert tokenizer.encode("a b") == [4, 3, 5]
    assert tokenizer.encode_marked("a <extra_id_0>")[-1] == 9
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_markers_among_ordinary_tokens_are_not_found_in_a_text(tmp_path: Path) -> None:
    """As Qwen's are."""
    backend = byte_level(["<|endoftext|>"])
    names = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    backend.add_tokens([tokenizers.AddedToken(name, special=False) for name in names])
    tokenizer = save(backend, tmp_path, {"eos_token": "<|endoftext|>"})
    assert tokenizer.fim_ids == tuple(backend.token_to_id(name) for name in names)
    assert not set(tokenizer.fim_ids or ()) & set(tokenizer.encode("a<|fim_prefix|>b"))
    assert tokenizer.encode_marked("a<|fim_prefix|>b")[1:-1] == [tokenizer.fim_ids[0]]  # type: ignore[index]
    assert set(tokenizer.fim_ids or ()) <= set(tokenizer.special_ids.tolist())


def test_a_text_that_is_cut_straight_into_tokens_has_no_words(tmp_path: Path) -> None:
    backend = t5(0)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert not save(backend, tmp_path, {}).has_words
    backend.pre_tokenizer = None
    assert not save(backend, tmp_path, {}).has_words


def test_marian_has_no_form_for_the_library(tmp_path: Path) -> None:
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "vocab.json").write_text('{"</s>": 0}')
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*Marian's two SentencePiece .*tokenizer=unigram"):
        Tokenizer.load(tmp_path)


def test_transformers_tells_the_parts_of_a_pair_apart(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    WordPiece(40).build(TEXTS).save(tmp_path)
    pair = transformers.AutoTokenizer.from_pretrained(tmp_path)("hello world", "the fox")
    segments = pair["token_type_ids"]
    assert segments == sorted(segments)
    assert set(segments) == {0, 1}
    assert segments.index(1) == pair["input_ids"].index(3) + 1


def test_a_vocabulary_below_the_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=5: .* at least 6"):
        WordPiece(5)
