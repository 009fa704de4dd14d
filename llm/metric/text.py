"""Generated texts against references, by the reference libraries themselves.

A metric scores the texts of a whole set; see llm/metric/score.py for its interval.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from llm.metric.classification import confusion_metrics
from llm.metric.score import Score, bootstrapped, mean

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # of each text one or more
Metric = Callable[[Texts, References, int], dict[str, Score]]


def bleu(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu (Post 2018), tokenised by its 13a."""
    metric = _library(_LIBRARIES["bleu"]).BLEU()
    return {"bleu": _sacrebleu(metric, texts, references, n_bootstrap)}


def chrf(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """Character F-score chrF2 (Popović 2015) by sacrebleu."""
    metric = _library(_LIBRARIES["chrf"]).CHRF()
    return {"chrf": _sacrebleu(metric, texts, references, n_bootstrap)}


def rouge(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """ROUGE-1, -2 and -L (Lin 2004), F1 with stems by rouge-score, in per cent; of several references the best one."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = _library(_LIBRARIES["rouge"]).RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score_multi(list(several), text) for text, several in zip(texts, references, strict=True)]
    return {
        kind: mean([100 * scores[kind].fmeasure for scores in found], n_bootstrap, "rouge-score, stemmed")
        for kind in kinds
    }


def squad(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """Exact match and F1 of words, in per cent, as the script of SQuAD 1.1 and 2.0 has them (Rajpurkar et al. 2018): an
    answer that there is none is the empty text."""
    exact, f1 = [], []
    for text, several in zip(texts, references, strict=True):
        answers = list(several) or [""]
        exact.append(100.0 * max(_normal(text) == _normal(answer) for answer in answers))
        f1.append(100.0 * max(_word_f1(text, answer) for answer in answers))
    return {"exact": mean(exact, n_bootstrap), "f1": mean(f1, n_bootstrap)}


def accuracy(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """How many texts are one of their references, in per cent, blanks around them aside."""
    right = [
        100.0 * any(text.strip() == one.strip() for one in several)
        for text, several in zip(texts, references, strict=True)
    ]
    return {"accuracy": mean(right, n_bootstrap)}


def distinct(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """How many of all pairs of neighbouring words, and of all words, are different ones (Li et al. 2016), in per cent,
    and the mean number of words."""
    words = [text.split() for text in texts]
    found = {}
    for n in (1, 2):
        grams = [tuple(one[at : at + n]) for one in words for at in range(len(one) - n + 1)]
        found[f"distinct_{n}"] = Score(100 * len(set(grams)) / max(1, len(grams)))
    return found | {"n_words": mean([float(len(one)) for one in words], n_bootstrap)}


def classes(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """Macro-averaged F1, in per cent, and Matthews' correlation of labels."""
    names = sorted({*texts, *(several[0] for several in references)})
    number = {name: at for at, name in enumerate(names)}
    pairs = np.array([[number[several[0]], number[text]] for text, several in zip(texts, references, strict=True)])

    def scored(chosen: np.ndarray) -> tuple[float, float]:
        confused = np.zeros((len(names), len(names)), np.int64)
        np.add.at(confused, (chosen[:, 0], chosen[:, 1]), 1)
        found = confusion_metrics(confused)
        return 100 * found["macro_f1"], found["mcc"]

    found = bootstrapped(scored, pairs, n_bootstrap)
    return dict(zip(("macro_f1", "mcc"), found, strict=True))


def tags(texts: Texts, references: References, n_bootstrap: int = 0) -> dict[str, Score]:
    """Of the labels of words, one text of them for each sentence: how many are right, and macro-averaged F1, in per
    cent. A word that there was no room for has none, which is wrong."""
    found: list[str] = []
    truth: list[list[str]] = []
    for text, several in zip(texts, references, strict=True):
        wanted, given = several[0].split(), text.split()
        found += [*given, *["-"] * (len(wanted) - len(given))][: len(wanted)]
        truth += [[name] for name in wanted]
    macro = classes(found, truth, n_bootstrap)["macro_f1"]
    return {**accuracy(found, truth, n_bootstrap), "macro_f1": macro}


METRICS: dict[str, Metric] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "squad": squad,
    "accuracy": accuracy,
    "classes": classes,
    "distinct": distinct,
    "tags": tags,
}


_LIBRARIES = {"bleu": "sacrebleu.metrics", "chrf": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}


def check_installed(metrics: Sequence[str]) -> None:
    """Raises ValueError if one of METRICS wants a library that is not here: to be known before texts are generated."""
    for metric in metrics:
        if metric in _LIBRARIES:
            _library(_LIBRARIES[metric])


def _library(name: str) -> Any:
    """One of those that score. Raises ValueError if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        library = name.partition(".")[0]
        raise ValueError(f"{library} is not installed: pip install 'llm-on-lightning[evaluate]'") from None


def _sacrebleu(metric: Any, texts: Texts, references: References, n_bootstrap: int) -> Score:
    most = max(map(len, references))
    columns = [[one[at] if at < len(one) else "" for one in references] for at in range(most)]
    if not n_bootstrap:
        score = metric.corpus_score(list(texts), columns)
        return Score(score.score, signature=str(metric.get_signature()))
    score = metric.corpus_score(list(texts), columns, n_bootstrap=n_bootstrap)
    low, high = float(score._mean - score._ci), float(score._mean + score._ci)
    return Score(score.score, low, high, str(metric.get_signature()))


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = {ord(character): None for character in string.punctuation}


def _normal(text: str) -> str:
    """In small letters, without punctuation, articles and further blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(text: str, answer: str) -> float:
    mine, theirs = _normal(text).split(), _normal(answer).split()
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0
