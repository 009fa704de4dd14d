"""Tokenizers of encoders and encoder-decoders: their special tokens, their words, and that training is repeatable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.tokenizer import ByteLevelBPE, Bytes, Tokenizer, Unigram, WordPiece

TEXTS = [
    "The quick brown foxes jump over 12345 lazy dogs; unbelievable, isn't it?\nÉcole  façade." * 30,
    "def f(x): return x" * 30,
]
RECIPES = {
    "wordpiece": WordPiece(160),
    "unigram": Unigram(120, n_sentinels=10),
    "bpe": ByteLevelBPE(320, fill_in_the_middle=True),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: recipe.build(TEXTS) for name, recipe in RECIPES.items()}


def test_specials_are_where_the_families_have_them(tokenizers: dict[str, Tokenizer]) -> None:
    bert, t5, bpe = tokenizers["wordpiece"], tokenizers["unigram"], tokenizers["bpe"]
    assert (bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id, bert.eot_id) == (0, 2, 3, 4, 3)
    assert bert.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert (t5.pad_id, t5.eot_id, t5.cls_id, t5.mask_id) == (0, 1, None, None)
    assert t5.sentinel_ids == [t5.vocab_size - 1 - number for number in range(10)]
    assert t5.vocab_size <= 120
    assert t5.special_ids.tolist() == [0, 1, 2, *sorted(t5.sentinel_ids)]
    assert bpe.fim_ids == (1, 2, 3)
    assert (bpe.sentinel_ids, bert.fim_ids) == ([], None)


@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_text_is_cut_into_its_own_characters(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    text = "lazy foxes jump" if name == "wordpiece" else "lazy  foxes jump\nover 123"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).strip() == text
    assert not set(ids) & set(tokenizer.special_ids.tolist())
    assert tokenizer.vocab_size <= RECIPES[name].vocab_size


def test_special_names_in_a_text_are_text_and_in_a_prompt_are_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    for name, marker in (("wordpiece", "[MASK]"), ("unigram", "<extra_id_3>"), ("bpe", "<fim_middle>")):
        tokenizer = tokenizers[name]
        special = tokenizer.backend.token_to_id(marker)
        assert special not in tokenizer.encode(f"the {marker} dog")
        marked = tokenizer.encode_marked(f"the {marker} dog")
        assert marked.count(special) == 1
        assert [i for i in marked if i != special] == [*tokenizer.encode("the "), *tokenizer.encode(" dog")]
    assert Bytes().build().encode_marked("a[MASK]") == list(b"a[MASK]")


def test_words(tokenizers: dict[str, Tokenizer]) -> None:
    ((ids, starts),) = tokenizers["wordpiece"].encode_words(["unbelievable dogs, isn't"])
    pieces = [tokenizers["wordpiece"].backend.id_to_token(int(i)) for i in ids]
    assert starts.tolist() == [not piece.startswith("##") for piece in pieces]
    assert ids.tolist() == tokenizers["wordpiece"].encode("unbelievable dogs, isn't")
    assert starts.sum() == 6  # unbelievable dogs , isn ' t
    for name in ("unigram", "bpe"):
        ((ids, starts),) = tokenizers[name].encode_words(["lazy dogs"])
        assert starts.sum() == 2
        assert tokenizers[name].decode(ids[np.flatnonzero(starts)[1] :]).strip() == "dogs"
    assert tokenizers["bpe"].has_words
    assert not Bytes().build().has_words


def test_transformers_reads_the_folders(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, (before, between, after) in {"wordpiece": ([2], [3], [3]), "unigram": ([], [1], [1])}.items():
        tokenizer = tokenizers[name]
        tokenizer.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        one, other = tokenizer.encode("lazy dogs"), tokenizer.encode("foxes")
        assert theirs("lazy dogs", "foxes")["input_ids"] == [*before, *one, *between, *other, *after]
        assert theirs.pad_token_id == tokenizer.pad_id
        again = Tokenizer.load(tmp_path / name)
        assert (again.mask_id, again.sentinel_ids) == (tokenizer.mask_id, tokenizer.sentinel_ids)
        assert again.fingerprint == tokenizer.fingerprint


def test_equal_texts_give_equal_tokenizers(tokenizers: dict[str, Tokenizer]) -> None:
    """In a process of its own, whose hash tables have another order, and with another number of threads."""
    program = (
        "from tests.test_special_tokens import RECIPES, TEXTS\n"
        "print(*(recipe.build(TEXTS).fingerprint for recipe in RECIPES.values()))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [tokenizer.fingerprint for tokenizer in tokenizers.values()]


def test_too_few_entries_for_the_sentinels() -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size=100: tokenizer.n_sentinels=100 of these .* at least 108"
    ):
        Unigram(100)
