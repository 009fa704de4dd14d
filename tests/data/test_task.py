"""What becomes of a text: nothing is lost, the rates are those asked for, and labels tell the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import DataError, FillInTheMiddle, Masking, NextToken, SpanDenoising, TextData
from llm.data.example import IGNORED, Symbols, cut_spans, fill_in_the_middle, generator, hide
from llm.data.pack import pack
from llm.data.pair import ELSEWHERE, FOLLOWS, draw_pairs
from llm.data.steps import TrainSteps
from llm.data.task import Widths
from llm.tokenizer import ByteLevelBPE, Bytes, Unigram, WordPiece
from tests.data.conftest import make_texts, write_jsonl

SYMBOLS = Symbols(0, 1, 2, 3, 4, np.arange(199, 99, -1), (5, 6, 7), np.arange(10, 100))
texts = st.integers(1, 300).map(lambda n: np.random.default_rng(n).integers(10, 100, n))
seeds = st.integers(0, 1000)
rates = st.sampled_from([0.1, 0.15, 0.3, 0.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "text.jsonl", make_texts(300, longest=400))
    return folder


def make(folder: Path, recipe: Any, tasks: dict[str, Any], **arguments: Any) -> TextData:
    arguments = {"max_length": 64, "batch_size": 6, "cache_dir": str(folder / "cache"), **arguments}
    data = TextData(recipe, path=str(folder / "text.jsonl"), tasks=tasks, **arguments)
    data.prepare()
    return data


def batch(data: TextData, index: int, place: tuple[int, int, int | None] = (0, 1, None)) -> dict[str, torch.Tensor]:
    steps = TrainSteps(*data._mixture(data._prepared.train), place, data._settings, data.order)
    (whole,) = steps[index].micro_batches
    return whole


# Hidden tokens


@given(texts, seeds, rates)
def test_hidden_tokens_are_the_rate_and_can_be_restored(text: np.ndarray, seed: int, rate: float) -> None:
    shown = hide(text, None, Masking(rate=rate), SYMBOLS, generator(seed, 0, 0, 0))
    predicted = shown["labels"] != IGNORED
    assert predicted.sum() == max(1, round(len(text) * rate))
    assert (np.where(predicted, shown["labels"], shown["tokens"]) == text).all()
    assert set(shown["tokens"].tolist()) <= {4, *SYMBOLS.ordinary.tolist()}


def test_four_fifths_are_masked_and_a_tenth_is_something_else() -> None:
    text = np.random.default_rng(0).integers(10, 100, 200_000)
    shown = hide(text, None, Masking(), SYMBOLS, generator(0, 0, 0, 0))
    predicted = shown["labels"] != IGNORED
    masked = (shown["tokens"] == 4)[predicted].mean()
    kept = (shown["tokens"] == text)[predicted].mean()
    assert masked == pytest.approx(0.8, abs=0.01)  # 30,000 draws: a standard error of 0.0023
    assert kept == pytest.approx(0.1 + 0.1 / 90, abs=0.01)  # one in 90 random tokens is the very one


@given(texts, seeds, st.data())
def test_whole_words_are_hidden_whole(text: np.ndarray, seed: int, data: st.DataObject) -> None:
    words = np.array([True, *data.draw(st.lists(st.booleans(), min_size=len(text) - 1, max_size=len(text) - 1))])
    predicted = hide(text, words, Masking(), SYMBOLS, generator(seed, 0, 0, 0))["labels"] != IGNORED
    word = np.cumsum(words)
    hidden = set(word[predicted].tolist())
    assert all(predicted[word == index].all() for index in hidden)
    assert predicted.any()
    assert predicted.sum() <= max(1, round(len(text) * 0.15)) or len(hidden) == 1


def test_whole_words_come_to_the_rate_too() -> None:
    shares = []
    for seed in range(400):
        draw = generator(seed, 1, 0, 0)
        sizes = draw.choice([1, 2, 3, 4], 200, p=[0.6, 0.2, 0.1, 0.1])
        starts = np.concatenate([[1] + [0] * (size - 1) for size in sizes]).astype(bool)[:60]
        labels = hide(draw.integers(10, 100, 60), starts, Masking(whole_word=True), SYMBOLS, draw)["labels"]
        shares.append((labels != IGNORED).mean())
    assert np.mean(shares) == pytest.approx(0.15, abs=0.003)


# Spans


@given(texts.filter(lambda text: len(text) > 1), seeds, rates, st.sampled_from([1.0, 3.0, 5.0]))
def test_spans_can_be_put_back(text: np.ndarray, seed: int, rate: float, mean_span: float) -> None:
    task = SpanDenoising(rate=rate, mean_span=mean_span)
    n_noise, n_spans = (int(count[0]) for count in task.counts(np.array([len(text)])))
    if n_spans > len(SYMBOLS.sentinels):
        return
    source, target = cut_spans(text, task, SYMBOLS, generator(seed, 0, 0, 0))
    assert (len(source), len(target)) == tuple(int(size[0]) for size in task.sizes(np.array([len(text)])))
    assert source[-1] == target[-1] == SYMBOLS.end
    assert n_noise == np.clip(round(len(text) * rate), 1, len(text) - 1)
    spans, current = {}, []
    for token in target[:-1].tolist():
        if token >= 100:
            spans[token] = current = []
        else:
            current.append(token)
    assert list(spans) == SYMBOLS.sentinels[:n_spans].tolist()
    assert all(spans.values()), "no span is empty"
    assert sum(map(len, spans.values())) == n_noise
    restored = [t for token in source[:-1].tolist() for t in (spans[token] if token >= 100 else [token])]
    assert restored == text.tolist()


def test_span_lengths_and_rate_of_t5() -> None:
    task = SpanDenoising()
    assert task.target_width(512) == 114  # as the released configurations have it
    n_noise, n_spans = task.counts(np.array([568]))
    assert (n_noise[0], n_spans[0]) == (85, 28)
    assert n_noise[0] / n_spans[0] == pytest.approx(3, abs=0.1)
    assert task.longest(Widths(512, 114)) == 568


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(20, 90), st.integers(8, 60))
@settings(max_examples=50)
def test_rows_hold_both_sides(lengths: list[int], row: int, target: int) -> None:
    task, widths = SpanDenoising(), Widths(row, target)
    starts = np.cumsum([0, *lengths[:-1]])
    (packed,) = pack(starts, np.array(lengths), row, task.longest(widths), lambda n: task.cost(n, widths))
    assert packed.lengths.sum() == sum(lengths), "no token is lost"
    for first, last in zip([0, *packed.ends[:-1]], packed.ends, strict=True):
        source, written = task.sizes(packed.lengths[first:last].astype(np.int64))
        assert source.sum() <= row
        assert written.sum() <= target


# The middle


@given(texts, seeds, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_the_middle_can_be_put_back(text: np.ndarray, seed: int, spm_rate: float, ended: bool) -> None:
    stored = np.concatenate([[1], text, [1] if ended else []]).astype(np.int64)
    shown = fill_in_the_middle(stored, FillInTheMiddle(1.0, spm_rate), SYMBOLS, generator(seed, 0, 0, 0))
    assert shown["tokens"][0] == 1
    assert (shown["tokens"][1:] == shown["labels"][:-1]).all()
    moved = shown["labels"].tolist()
    assert len(moved) == len(stored) - 1 + 3
    if ended:
        assert moved.pop() == 1
    prefix_at, suffix_at, middle_at = (moved.index(marker) for marker in (5, 7, 6))
    assert prefix_at == 0
    if suffix_at == 1 and spm_rate == 1.0:  # suffix, then prefix and middle together
        restored = [*moved[middle_at + 1 :], *moved[2:middle_at]]
    else:
        restored = [*moved[1:suffix_at], *moved[middle_at + 1 :], *moved[suffix_at + 1 : middle_at]]
    if spm_rate != 0.5:
        assert restored == text.tolist()
    untouched = fill_in_the_middle(stored, FillInTheMiddle(0.0), SYMBOLS, generator(seed, 0, 0, 0))
    assert untouched["labels"].tolist() == stored[1:].tolist()


# Pairs


@given(st.lists(st.integers(0, 200), min_size=2, max_size=30).filter(lambda n: sum(map(bool, n)) > 1), seeds)
def test_labels_of_pairs_are_true_to_the_corpus(lengths: list[int], seed: int) -> None:
    starts = np.cumsum([1, *(np.array(lengths) + 2)[:-1]])
    document = np.full(int(starts[-1]) + lengths[-1] + 2, -1)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        document[start : start + length] = index
    pairs = draw_pairs(starts, np.array(lengths), 61, (seed, 0))
    used = np.zeros(len(document), int)
    for first, n_first, second, n_second, label in zip(
        pairs.first, pairs.n_first, pairs.second, pairs.n_second, pairs.label, strict=True
    ):
        a, b = document[first : first + n_first], document[second : second + n_second]
        assert min(n_first, n_second) >= 1
        assert n_first + n_second <= 61
        assert len(set(a.tolist())) == len(set(b.tolist())) == 1, "a part is of one document"
        used[first : first + n_first] += 1
        if label == FOLLOWS:
            used[second : second + n_second] += 1
            assert second == first + n_first
            assert a[0] == b[0]
        else:
            assert label == ELSEWHERE
            assert a[0] != b[0]
    assert used.max() <= 1, "no text is a first part, or goes on, twice"
    assert (document >= 0).sum() - used.sum() <= len(lengths), "at most the last token of a document has no partner"


def test_half_of_the_pairs_follow() -> None:
    pairs = draw_pairs(np.arange(200) * 1000, np.full(200, 998), 125, (0, 0))
    assert len(pairs) > 2000
    assert pairs.label.mean() == pytest.approx(0.5, abs=0.04)


def test_nothing_but_the_text_tells_the_two_kinds_of_pairs_apart() -> None:
    """Neither how long the parts are nor whether the second ends its document: what a model could read off instead."""
    for shortest, longest in ((20, 60), (50, 400), (500, 4000)):
        lengths = np.random.default_rng(0).integers(shortest, longest, 3000)
        starts = np.cumsum([0, *lengths[:-1]])
        pairs = draw_pairs(starts, lengths, 125, (0, 0))
        ends = set((starts + lengths).tolist())
        is_end = np.array([second + n in ends for second, n in zip(pairs.second, pairs.n_second, strict=True)])
        follows = pairs.label == FOLLOWS
        assert is_end[follows].mean() == pytest.approx(is_end[~follows].mean(), abs=0.05)
        assert pairs.n_second[follows].mean() == pytest.approx(pairs.n_second[~follows].mean(), rel=0.15)
        assert (np.minimum(pairs.n_first, pairs.n_second) < 4).mean() < {20: 0.2, 50: 0.1, 500: 0.03}[shortest]


def test_one_document_among_empty_ones_is_no_endless_search() -> None:
    pairs = draw_pairs(np.array([0, 40, 40]), np.array([40, 0, 3]), 20, (0, 0))
    assert set(pairs.second[pairs.label == ELSEWHERE].tolist()) <= {40, 41, 42}


# Batches


CASES = {
    "masked": (WordPiece(200), {"masked_lm": Masking()}),
    "pairs": (WordPiece(200), {"masked_lm": Masking(next_sentence=True, whole_word=True, n_copies=2)}),
    "spans": (Unigram(200, n_sentinels=30), {"span_denoising": SpanDenoising()}),
    "middle": (ByteLevelBPE(300, True), {"causal_lm": NextToken(), "middle": FillInTheMiddle(weight=2.0)}),
}


@pytest.mark.parametrize("name", CASES)
def test_batches(folder: Path, name: str) -> None:
    """The same for any number of processes; other noise in another epoch; rows well filled; documents apart."""
    data = make(folder, *CASES[name])
    whole = batch(data, 3)
    parts = [batch(data, 3, (rank, 3, None)) for rank in range(3)]
    for key, values in whole.items():
        joined = [part[key] for part in parts]
        if values.dim() == 2 and key in ("cls_at", "pair_labels"):
            width = values.shape[1]
            value = 0 if key == "cls_at" else IGNORED
            joined = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in joined]
        assert torch.equal(torch.cat(joined), values), key
        assert values.dtype == torch.int64
    sides = ("", "source_") if name == "spans" else ("",)
    for side in sides:
        documents, positions = whole[f"{side}documents"], whole[f"{side}positions"]
        assert ((positions == 0) | (positions == positions.roll(1, 1) + 1)).all()
        assert (whole[f"{side}tokens"][documents == 0] == data.tokenizer.pad_id).all()
    assert (whole["labels"][whole["documents"] == 0] == IGNORED).all()
    report = data.report()["train"]["files"]
    fills = [part["fill"] for part in report.values()] if name == "middle" else [report["fill"]]
    assert min(fills) > 0.85  # of small corpora; blocks of real size are fuller
    assert set(whole["tasks"].tolist()) <= set(range(len(data.task_names)))


def test_noise_changes_with_the_epoch_and_the_seed_only(folder: Path) -> None:
    data = make(folder, *CASES["masked"])
    n_steps = data.n_steps(max_epochs=1)
    seen: dict[int, list[np.ndarray]] = {}
    for index in range(3 * n_steps):
        step = batch(data, index)
        for sample, labels in zip(step["samples"].tolist(), step["labels"].numpy(), strict=True):
            seen.setdefault(sample, []).append(labels)
    assert all(not np.array_equal(turns[0], turns[1]) for turns in seen.values() if len(turns) > 1)
    again, other = make(folder, *CASES["masked"]), make(folder, *CASES["masked"], seed=1)
    assert torch.equal(batch(again, 2)["labels"], batch(data, 2)["labels"])
    assert not torch.equal(batch(other, 2)["labels"], batch(data, 2)["labels"])


def test_pairs_are_found_by_their_first_token(folder: Path) -> None:
    data = make(folder, *CASES["pairs"])
    step, tokenizer = batch(data, 0), data.tokenizer
    real = step["pair_labels"] != IGNORED
    at = step["cls_at"][real]
    rows = torch.arange(6).unsqueeze(1).expand_as(real)[real]
    assert (step["tokens"][rows, at] == tokenizer.cls_id).all()
    assert real.sum() == (step["tokens"] == tokenizer.cls_id).sum()
    assert (step["segments"][rows, at] == 0).all()
    assert set(step["segments"].flatten().tolist()) == {0, 1}
    assert step["segments"][step["documents"] == 0].sum() == 0


def test_labels_of_packed_pairs_are_true_to_the_corpus(folder: Path) -> None:
    data = make(folder, *CASES["pairs"])
    (rows,) = data._prepared.train.values()
    starts, lengths, labels = rows.second
    behind = rows.starts + rows.lengths == starts
    assert (behind == (labels == FOLLOWS)).all()
    step, ends = batch(data, 0), np.concatenate([[0], rows.ends])
    for sample, found, at in zip(step["samples"].tolist(), step["pair_labels"], step["cls_at"], strict=True):
        pieces = range(int(ends[sample]), int(ends[sample + 1]))
        assert found[found != IGNORED].tolist() == [int(labels[piece]) for piece in pieces]
        sizes = [int(rows.lengths[piece] + lengths[piece]) + 3 for piece in pieces]
        assert at[: len(sizes)].tolist() == np.cumsum([0, *sizes[:-1]]).tolist()


def test_words_are_hidden_whole_in_a_batch(folder: Path) -> None:
    """A token that goes on with a word (##) shares the fate of the one before it, unless the piece begins there."""
    data = make(folder, WordPiece(60), CASES["pairs"][1])  # few words are one token
    step, tokenizer = batch(data, 0), data.tokenizer
    predicted = step["labels"] != IGNORED
    original = torch.where(predicted, step["labels"], step["tokens"])
    n_checked = 0
    for row in range(6):
        names = [tokenizer.backend.id_to_token(index) or "" for index in original[row].tolist()]
        for place in range(1, 64):
            special = names[place - 1] in ("[CLS]", "[SEP]")
            if names[place].startswith("##") and not special:
                n_checked += int(predicted[row, place])
                assert predicted[row, place] == predicted[row, place - 1]
    assert n_checked > 0


def test_weights_of_tasks_are_shares_of_tokens(folder: Path) -> None:
    data = make(folder, *CASES["middle"])
    counts = torch.zeros(2, dtype=torch.long)
    for index in range(2 * data.n_steps(max_epochs=1)):
        step = batch(data, index)
        counts += torch.bincount(step["tasks"].repeat_interleave((step["labels"] != IGNORED).sum(1)), minlength=2)
    assert (counts[1] / counts[0]).item() == pytest.approx(2.0, rel=0.1)


def test_another_mean_span_is_packed_anew(folder: Path) -> None:
    """Of short pieces the two have the same sizes, of long ones not."""
    long = {"max_length": 256, "batch_size": 2}
    recipe = Unigram(200, n_sentinels=60)
    make(folder, recipe, {"spans": SpanDenoising(mean_span=3.1)}, **long)
    data = make(folder, recipe, {"spans": SpanDenoising()}, **long)
    for index in range(data.n_steps(max_epochs=1)):
        batch(data, index)


def test_source_and_target_documents_belong_together(folder: Path) -> None:
    data = make(folder, *CASES["spans"])
    step, tokenizer = batch(data, 0), data.tokenizer
    sentinels = set(tokenizer.sentinel_ids)
    assert step["tokens"].shape[1] == data.target_length == SpanDenoising().target_width(64)
    for row in range(6):
        assert step["documents"][row].max() == step["source_documents"][row].max()
        for number in range(1, int(step["documents"][row].max()) + 1):
            target = step["labels"][row][step["documents"][row] == number].tolist()
            source = step["source_tokens"][row][step["source_documents"][row] == number].tolist()
            assert [t for t in target if t in sentinels] == [t for t in source if t in sentinels]
            inputs = step["tokens"][row][step["documents"][row] == number].tolist()
            assert inputs == [tokenizer.pad_id, *target[:-1]]


# Refusals


@pytest.mark.parametrize(
    ("recipe", "tasks", "arguments", "message"),
    [
        (Bytes(), {"masked_lm": Masking()}, {}, r"no \[CLS\] and no \[SEP\] and no \[MASK\]; take tokenizer=wordpiece"),
        (Bytes(), {"span_denoising": SpanDenoising()}, {}, "no sentinels .* take tokenizer=unigram"),
        (Bytes(), {"middle": FillInTheMiddle()}, {}, "tokenizer=bpe tokenizer.fill_in_the_middle=true"),
        (Unigram(120, n_sentinels=2), {"spans": SpanDenoising()}, {}, "makes 3 spans, the tokenizer has 2 sentinels"),
        (WordPiece(200), {"masked_lm": Masking()}, {"max_length": 2}, "data.max_length=2: has no room for what"),
        (
            WordPiece(200),
            {"masked_lm": Masking(next_sentence=True)},
            {"max_length": 10},
            "a pair .* needs 11; raise it",
        ),
        (Unigram(120), {"spans": SpanDenoising()}, {"max_length": 1}, "data.max_length=1, .* no room for a text with"),
        (Unigram(120), {"spans": SpanDenoising()}, {"target_length": 2}, "data.target_length=2: no room for a text"),
    ],
)
def test_what_the_tokenizer_lacks_is_named(
    folder: Path, recipe: Any, tasks: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(folder, recipe, tasks, **arguments)


def test_tasks_of_two_families_do_not_mix(folder: Path) -> None:
    tasks = {"causal_lm": NextToken(), "masked_lm": Masking()}
    with pytest.raises(ValueError, match=r"causal_lm \(model.family=decoder\), masked_lm \(model.family=encoder\)"):
        TextData(WordPiece(200), path="x", tasks=tasks)
    with pytest.raises(ValueError, match=r"data.target_length=9: rows of masked_lm have no target"):
        TextData(WordPiece(200), path="x", tasks={"masked_lm": Masking()}, target_length=9)


def test_a_text_of_nothing_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [" "] * 9 + ["a word"] * 1)
    settings = {"path": str(tmp_path / "text.jsonl"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match="no document has enough tokens for data"):
        TextData(WordPiece(60), tasks={"masked_lm": Masking()}, val_every=10, **settings).prepare()


def test_one_document_has_no_other(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", ["one two three four five six"])
    tasks = {"masked_lm": Masking(next_sentence=True)}
    data = TextData(
        WordPiece(60), path=str(tmp_path / "one.jsonl"), tasks=tasks, val_every=None, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match="next_sentence: the second part of a pair may come from another document"):
        data.prepare()
