from __future__ import annotations

import gzip
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.metric import (
    bits_per_byte,
    gzip_bits_per_byte,
    model_flops_utilisation,
    perplexities,
    unigram_bits_per_byte,
)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)
    assert math.isnan(bits_per_byte(0.0, 0))


@given(st.lists(st.text(max_size=200), min_size=1).filter(lambda texts: any(texts)))
def test_unigram_is_the_entropy_of_the_bytes(texts: list[str]) -> None:
    raw = "".join(texts).encode()
    entropy = -sum(raw.count(b) / len(raw) * math.log2(raw.count(b) / len(raw)) for b in set(raw))
    assert unigram_bits_per_byte(texts) == pytest.approx(entropy, abs=1e-9)


def test_a_perplexity_that_no_number_holds_is_infinite() -> None:
    found = perplexities([3000.0, 2.0], [4, 2], ["oneword", "two words"])
    assert found["perplexity"].value == pytest.approx(math.exp(3002 / 6))
    assert found["word_perplexity"].value == math.inf


def test_unigram_of_all_bytes_once_is_eight() -> None:
    assert unigram_bits_per_byte(["".join(map(chr, range(128)))]) == pytest.approx(7)


def test_gzip_is_taken_text_by_text() -> None:
    texts = ["abc" * 50, "äöü" * 50]
    raw = [text.encode() for text in texts]
    expected = 8 * sum(len(gzip.compress(r, 9)) for r in raw) / sum(map(len, raw))
    assert gzip_bits_per_byte(texts) == pytest.approx(expected)
    assert math.isnan(gzip_bits_per_byte([]))


def test_utilisation_of_llm_c_on_gpt2() -> None:
    """speed.md's anchor: 468k tokens/s of GPT-2 124M at T 1024 on an H100 is 40.7 %."""
    flops = 6 * 124_475_904 + 12 * 12 * 12 * 64 * 1024
    assert model_flops_utilisation(468e3, flops, 989e12) == pytest.approx(0.407, abs=0.002)
