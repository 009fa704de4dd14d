"""Generated texts against the reference libraries, and intervals against what they should cover."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.metric import METRICS, confusion_metrics
from llm.metric.text import mean, squad

TEXTS = ["the cat sat on the mat", "a dog", "", "ein Haus am See steht dort allein"]
REFERENCES = [["the cat is on the mat"], ["a dog barks", "a dog"], ["something"], ["ein Haus am See steht allein dort"]]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="comes with the extra evaluate")
    columns = [
        [several[0] for several in REFERENCES],
        [several[1] if len(several) > 1 else "" for several in REFERENCES],
    ]
    assert METRICS["bleu"](TEXTS, REFERENCES, 0)["bleu"].value == sacrebleu.corpus_bleu(TEXTS, columns).score
    found = METRICS["chrf"](TEXTS, REFERENCES, 0)["chrf"]
    assert found.value == sacrebleu.corpus_chrf(TEXTS, columns).score
    assert "version:" in found.signature


def test_intervals_are_plain_numbers() -> None:
    """Which a file of scores can hold; those of sacrebleu's bootstrap are numpy's."""
    texts, references = ["a cat sat", "the dog ran home"], [["a cat sat down"], ["the dog ran home"]]
    for metric in ("bleu", "chrf", "rouge", "classes", "accuracy"):
        for score in METRICS[metric](texts, references, 10).values():
            assert json.loads(json.dumps(vars(score)))["low"] <= score.value


def test_rouge_is_rouge_scores() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="comes with the extra evaluate").RougeScorer(
        ["rouge1", "rougeL"], use_stemmer=True
    )
    found = METRICS["rouge"](TEXTS, REFERENCES, 0)
    for kind in ("rouge1", "rougeL"):
        best = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in several)
            for text, several in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert found[kind].value == pytest.approx(100 * sum(best) / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 100, 100),
        ("tower of Eiffel", ["eiffel tower"], 0, 80),
        ("", [], 100, 100),
        ("something", [], 0, 0),
        ("", ["a"], 100, 100),  # an article is nothing
        ("x y", ["z", "x"], 0, 200 / 3),
    ],
)
def test_squad_is_the_official_script(text: str, answers: list[str], exact: float, f1: float) -> None:
    found = squad([text], [answers])
    assert found["exact"].value == exact
    assert found["f1"].value == pytest.approx(f1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_confusions_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="comes with the extra test")
    confused = np.zeros((4, 4), np.int64)
    for truth, found in pairs:
        confused[truth, found] += 1
    truth, found = zip(*pairs, strict=True)
    ours = confusion_metrics(confused)
    assert ours["macro_f1"] == pytest.approx(metrics.f1_score(truth, found, average="macro"))
    assert ours["mcc"] == pytest.approx(metrics.matthews_corrcoef(truth, found), abs=1e-12)


def test_classes_and_accuracy() -> None:
    texts, references = ["a", "b", "b", " a "], [["a"], ["b"], ["a"], ["a"]]
    assert METRICS["accuracy"](texts, references, 0)["accuracy"].value == 75
    found = METRICS["classes"](["a", "b", "b", "a"], references, 200)
    assert found["mcc"].value == pytest.approx(1 / math.sqrt(3))
    low, high = found["macro_f1"].low, found["macro_f1"].high
    assert low is not None
    assert high is not None
    assert low < found["macro_f1"].value < high <= 100


def test_distinct_counts_words() -> None:
    found = METRICS["distinct"](["a a b", "a b"], [[""], [""]], 0)
    assert found["distinct_1"].value == pytest.approx(40)  # a and b, of five
    assert found["distinct_2"].value == pytest.approx(200 / 3)  # aa and ab, of three
    assert found["n_words"].value == 2.5


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of means of 50 drawings from a known distribution, some 95 in 100 intervals hold its mean."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        score = mean(draw.exponential(1.0, 50).tolist(), 200)
        assert score.low is not None
        assert score.high is not None
        held += score.low <= 1.0 <= score.high
    assert 175 <= held <= 198  # the bootstrap of a skewed distribution is somewhat too narrow
    assert mean([1.0, 2.0], 0).low is None
