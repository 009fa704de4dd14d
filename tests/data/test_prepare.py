"""Preparation reads each source once, keeps every token, and knows what has changed."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data import DataError, Files, encode
from llm.data import prepare as preparing
from llm.data.cache import caches
from llm.data.prepare import Held, Recipe, prepare_rows, prepare_tokenizer, prepare_tokens, sample
from llm.data.source import Source
from llm.data.task import NextToken, Widths
from llm.tokenizer import ByteLevelBPE, Bytes, Tokenizer, Unigram, WordPiece
from tests.data.conftest import make_texts, write_jsonl


@dataclass
class Counted(Source):
    """Documents that count how often they were read from the start."""

    texts: list[str]
    weight: float = 1.0
    held_out: list[str] = field(default_factory=list)
    n_reads: int = 0

    def documents(self) -> Iterator[str]:
        self.n_reads += 1
        yield from self.texts

    def fingerprint(self) -> str:
        return str(hash(tuple(self.texts)))

    def validation(self) -> Source | None:
        return Counted(self.held_out) if self.held_out else None


def documents_of(cache: Any) -> list[list[int]]:
    tokens = np.fromfile(cache.path / "tokens.bin", cache.meta["dtype"])
    bounds = np.fromfile(cache.path / "documents.bin", np.int64)
    assert bounds[-1] == len(tokens)
    return [tokens[a:b].tolist() for a, b in pairwise(bounds)]


def test_documents_lie_between_ends_of_text(tmp_path: Path) -> None:
    tokenizer = Bytes().build()
    source = Counted(["ab", "", "é", "", ""])
    cache = prepare_tokens("mine", source, tokenizer, tmp_path)
    assert documents_of(cache) == [[256, 97, 98, 256], [256, *"é".encode(), 256]]
    expected = {"documents": 2, "empty": 3, "tokens": 4, "bytes": 4, "dtype": "uint16"}
    assert {name: cache.meta[name] for name in expected} == expected


def test_a_tokenizer_with_a_start_of_its_own_puts_it_before_a_document(tmp_path: Path) -> None:
    backend = Bytes().build().backend
    backend.add_special_tokens(["<s>"])
    llama = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    caches = [prepare_tokens("mine", Counted(["ab"]), tokenizer, tmp_path) for tokenizer in (llama, Bytes().build())]
    assert [documents_of(cache) for cache in caches] == [[[257, 97, 98, 256]], [[256, 97, 98, 256]]]


@pytest.mark.parametrize("recipe", [ByteLevelBPE(300), WordPiece(300), Unigram(300), Bytes()], ids=repr)
def test_chunks_do_not_show(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where long documents are cut for them."""
    tokenizer = recipe.build(make_texts(50))
    source = Counted([*make_texts(100), " ".join(make_texts(200)), "x" * 300, "\n \t1".join(make_texts(20))])
    words = tokenizer.has_words
    whole = prepare_tokens("mine", source, tokenizer, tmp_path / "whole", words)
    monkeypatch.setattr(encode, "_CHUNK_PARTS", 7)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(encode, "_LONGEST_PART", 400)
    parts = prepare_tokens("mine", source, tokenizer, tmp_path / "parts", words)
    assert documents_of(parts) == documents_of(whole)
    assert parts.meta["content"] == whole.meta["content"]
    assert parts.meta["files"] == whole.meta["files"]
    assert (parts.path / "words.bin").read_bytes() == (whole.path / "words.bin").read_bytes()


def test_a_document_without_words_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_LONGEST_PART", 10)
    assert list(encode._cuts("x" * 25)) == [(0, 10), (10, 20), (20, 25)]
    assert list(encode._cuts("some words of text")) == [(0, 10), (10, 18)]
    assert list(encode._cuts("here is  text")) == [(0, 7), (7, 13)]
    assert list(encode._cuts("")) == []


@pytest.mark.parametrize("held", [Held(), Held(2), Held(2, out=True), Held(7), Held(7, out=True)], ids=str)
@pytest.mark.parametrize("n_documents", [1, 6, 7, 29])
def test_a_split_is_counted_and_found_without_a_list_of_it(held: Held, n_documents: int) -> None:
    chosen = [i for i in range(n_documents) if held.every is None or ((i + 1) % held.every == 0) == held.out]
    assert held.count(n_documents) == len(chosen)
    assert held.places(np.arange(len(chosen))).tolist() == chosen


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Bytes().build()
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        monkeypatch.setitem(tokenizer.__dict__, "vocab_size", size)
        cache = prepare_tokens("mine", Counted([f"text {size}"]), tokenizer, tmp_path)
        assert cache.meta["dtype"] == dtype
        assert documents_of(cache) == [[256, *f"text {size}".encode(), 256]]


def test_a_second_preparation_reads_nothing(tmp_path: Path) -> None:
    source = Counted(make_texts(100))
    recipe = ByteLevelBPE(300)

    def prepare(max_length: int = 16, every: int = 20) -> list[str]:
        tokenizer = prepare_tokenizer(recipe, {"mine": source}, every, tmp_path)
        tokens = prepare_tokens("mine", source, tokenizer, tmp_path)
        rows = prepare_rows("mine", tokens, Held(every), (NextToken(), Widths(max_length, 0)), tmp_path)
        return [tokens.path.name, rows.rows_cache.path.name]

    first = prepare()
    assert source.n_reads == 2  # the tokenizer's sample, the tokens
    assert prepare() == first
    assert source.n_reads == 2
    again = prepare(max_length=32)
    assert source.n_reads == 2, "another length packs the same tokens anew"
    assert (again[0] == first[0], again[1] == first[1]) == (True, False)
    source.texts[0] += "!"
    assert prepare()[0] != first[0]
    assert source.n_reads == 4


def test_only_the_tokenizer_that_needs_text_reads_it(tmp_path: Path) -> None:
    source = Counted(["a"])
    prepare_tokenizer(Bytes(), {"mine": source}, None, tmp_path)
    assert source.n_reads == 0
    assert caches(tmp_path) == []


def test_the_tokenizer_never_sees_held_out_documents(tmp_path: Path) -> None:
    texts = ["train " * 9, "", "train too " * 9, "held out", "train " * 9, "held out too"]
    assert list(sample({"mine": Counted(texts)}, 3)) == [texts[0], texts[2], texts[4], texts[5]]
    assert list(sample({"mine": Counted(texts)}, 2)) == [texts[0], texts[3], texts[5]]
    assert list(sample({"mine": Counted(["a", "b"], held_out=["c"])}, 2)) == ["a", "b"]


def test_what_the_tokenizer_leaves_out_is_what_is_held_out(tmp_path: Path) -> None:
    source = Counted(["", *make_texts(40), ""])
    tokenizer = Bytes().build()
    tokens = prepare_tokens("mine", source, tokenizer, tmp_path)
    train = prepare_rows("mine", tokens, Held(7), (NextToken(), Widths(16, 0)), tmp_path)
    val = prepare_rows("mine", tokens, Held(7, out=True), (NextToken(), Widths(16, 0)), tmp_path)
    assert [tokenizer.decode(ids) for ids in train.documents()] == list(sample({"mine": source}, 7))
    assert [tokenizer.decode(ids) for ids in val.documents()] == source.texts[1:-1][6::7]
    assert train.rows_cache.meta["documents"] + val.rows_cache.meta["documents"] == 40


def test_the_sample_is_bounded_spread_and_weighted() -> None:
    texts = [f"{i:03}" + "x" * 97 for i in range(500)]
    sources: dict[str, Source] = {"a": Counted(texts, weight=3.0), "b": Counted([t.upper() for t in texts], weight=1.0)}
    taken = list(sample(sources, None, n_characters=8000))
    lower = [int(text[:3]) for text in taken if text[-1] == "x"]
    upper = [text for text in taken if text[-1] == "X"]
    assert 3000 <= sum(map(len, taken)) <= 8000
    assert 2 <= len(lower) / len(upper) <= 4
    assert set(np.diff(lower).tolist()) == {16}, "evenly over the whole source"


def test_one_huge_document_is_sampled_in_part() -> None:
    assert [len(text) for text in sample({"a": Counted(["x" * 1000])}, None, 100)] == [100]


def test_the_sample_does_not_read_on_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_SAMPLE_REACH", 1000)
    endless = (str(i) * 9 for i in iter(int, 1))
    assert sum(map(len, preparing._thinned(endless, 500, "mine"))) <= 500


def test_sources_without_documents_are_errors(tmp_path: Path) -> None:
    tokenizer = Bytes().build()
    with pytest.raises(
        DataError, match=r"data source 'mine' has no documents \(only 2 empty ones\); check its files and"
    ):
        prepare_tokens("mine", Counted(["", ""]), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data source 'mine' has no documents \(none\)"):
        prepare_tokens("mine", Counted([]), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data source 'mine' has no training documents; check its files and data\.val"):
        prepare_tokenizer(ByteLevelBPE(300), {"mine": Counted([])}, None, tmp_path)
    assert caches(tmp_path) == []


def test_a_fault_in_the_middle_leaves_no_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    with path.open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:51: not JSON"):
        prepare_tokens("mine", Files(str(path)), Bytes().build(), tmp_path / "cache")
    assert caches(tmp_path / "cache") == []


def test_long_preparations_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(preparing.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"):
        prepare_tokens("mine", Counted(["abc"]), Bytes().build(), tmp_path)
    assert "mine: 1 documents, 0.00 GB tokenised" in caplog.text


def test_processes_that_prepare_at_once_share_one_preparation(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    code = (
        "import sys; from pathlib import Path; from llm.data.prepare import *; from llm.data import Files\n"
        "from llm.tokenizer import ByteLevelBPE; from llm.data.task import NextToken\n"
        "source, root = Files(sys.argv[1]), Path(sys.argv[2])\n"
        "tokenizer = prepare_tokenizer(ByteLevelBPE(300), {'mine': source}, 20, root)\n"
        "tokens = prepare_tokens('mine', source, tokenizer, root)\n"
        "layout = (NextToken(), Widths(64, 0))\n"
        "print(tokens.meta, prepare_rows('mine', tokens, Held(20), layout, root).rows_cache.meta)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    root = Path(__file__).parents[2]
    children = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {child.communicate(timeout=100)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(printed) == 1, "with the seconds that the one who did it took"
    assert [cache.kind for cache in caches(tmp_path / "cache")] == ["rows", "tokenizer", "tokens"]
