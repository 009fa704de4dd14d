"""A text of more characters than the vocabulary has room for."""

from __future__ import annotations

import pytest

from llm.tokenizer import ByteLevelBPE, Unigram, WordPiece

CHINESE = "".join(chr(0x4E00 + number) for number in range(500))
TEXTS = ["the quick fox and the lazy dog " * 20, CHINESE]


@pytest.mark.parametrize("recipe", [Unigram(130, n_sentinels=10), Unigram(108), WordPiece(130), ByteLevelBPE(280)])
def test_rare_characters_give_way(recipe: Unigram | WordPiece | ByteLevelBPE) -> None:
    tokenizer = recipe.build(TEXTS)
    assert tokenizer.vocab_size <= recipe.vocab_size
    assert len(tokenizer.encode(CHINESE)) > 0


def test_common_characters_stay() -> None:
    tokenizer = Unigram(130, n_sentinels=10).build(TEXTS)
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


@pytest.mark.parametrize("recipe", [Unigram(130, n_sentinels=10), WordPiece(130), ByteLevelBPE(280)])
@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_next_to_no_text(recipe: Unigram | WordPiece | ByteLevelBPE, texts: list[str]) -> None:
    assert recipe.build(texts).vocab_size <= recipe.vocab_size
