"""Heads for labels, tags and spans: the same scores in transformers, and the same weights back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from llm.checkpoint import huggingface, load_into, save, weights_of
from llm.model import Transformer, TransformerConfig, node_of

SETTINGS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "ffn_dim": 64,
    "max_length": 16,
    "vocab_size": 40,
    "family": "encoder",
    "position": "learned",
    "norm": "layer",
    "norm_position": "post",
    "embed_norm": True,
    "activation": "gelu",
    "bias": True,
    "tie_embeddings": True,
    "head_bias": True,
    "n_segments": 2,
    "initialisation": "bert",
}


@pytest.mark.parametrize(
    ("name", "label_of", "n_labels"),
    [
        ("BertForSequenceClassification", "text", 3),
        ("BertForTokenClassification", "token", 5),
        ("BertForQuestionAnswering", "token", 2),
    ],
)
def test_a_head_is_that_of_transformers(
    tmp_path: Path, name: str, label_of: Literal["text", "token"], n_labels: int
) -> None:
    import transformers

    torch.manual_seed(0)
    config = TransformerConfig(**SETTINGS, n_labels=n_labels, label_of=label_of)  # type: ignore[arg-type]
    model = Transformer(config).eval()
    for parameter in model.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.2)
    spans = name == "BertForQuestionAnswering"
    labels = [] if spans else [f"label {number}" for number in range(n_labels)]
    huggingface.write(config, weights_of(model), None, tmp_path / "out", labels, spans=spans)
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    tokens, segments = torch.randint(2, 40, (2, 9)), torch.tensor([[0] * 4 + [1] * 5] * 2)
    with torch.no_grad():
        found = theirs(tokens, token_type_ids=segments)
        hidden = model(tokens, segments=segments)
        mine = model.label_logits(hidden[:, 0] if label_of == "text" else hidden)
    expected = torch.stack((found.start_logits, found.end_logits), -1) if spans else found.logits
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    if labels:
        assert theirs.config.id2label == dict(enumerate(labels))
    again = huggingface.read(tmp_path / "out")
    assert (again.config.n_labels, again.config.label_of, again.anew) == (n_labels, label_of, [])
    assert all(torch.equal(again.state[key], weight) for key, weight in weights_of(model).items())


def stored(config: TransformerConfig, labels: list[str], out: Path) -> dict[str, torch.Tensor]:
    """A step directory of a classifier with these labels; returns its weights."""
    weights = weights_of(Transformer(config))
    cfg = {"model": node_of(config), "data": {"tasks": {"classification": {"labels": labels}}}}
    file = out.with_name("config.yaml")
    file.write_text(yaml.safe_dump(cfg))
    save(out, {f"model.{name}": weight for name, weight in weights.items()}, {}, [file])
    return weights


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize(
    ("changes", "labels", "told"),
    [
        ({"n_labels": 2}, ["bad", "good"], "model.n_labels: 2 - the weights have 3"),
        ({"label_of": "token"}, ["a", "b", "c"], "model.label_of: token - the weights have text"),
        ({}, ["c", "b", "a"], "labels: c, b, a - the weights have a, b, c"),
        ({}, ["a", "b", "c"], None),
        ({}, [], None),  # not known
    ],
)
def test_a_classifier_of_other_labels_starts_anew(
    tmp_path: Path,
    changes: dict[str, Any],
    labels: list[str],
    told: str | None,
    theirs: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a run of ours, and of a folder of Hugging Face's."""
    config = TransformerConfig(**SETTINGS, n_labels=3)  # type: ignore[arg-type]
    weights = stored(config, ["a", "b", "c"], tmp_path / "step")
    if theirs:
        huggingface.write(config, weights, None, tmp_path / "out", ["a", "b", "c"])
    model = Transformer(replace(config, **changes))
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    anew = load_into(model, tmp_path / ("out" if theirs else "step"), labels)
    assert anew == ([] if told is None else ["classifier.weight", "classifier.bias"])
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, (before if name in anew else weights)[name])
    if told is not None:
        assert f"its classifier is of other labels, and left: {told}" in caplog.text
        assert "so they start anew: classifier.weight, classifier.bias" in caplog.text


def test_numbers_are_no_names_of_labels_and_a_span_has_its_own(tmp_path: Path) -> None:
    config = TransformerConfig(**SETTINGS, n_labels=2, label_of="token")  # type: ignore[arg-type]
    weights = weights_of(Transformer(config))
    for name, labels, spans in (("numbered", [], False), ("named", ["a", "b"], False), ("span", [], True)):
        huggingface.write(config, weights, None, tmp_path / name, labels, spans=spans)
    assert [huggingface.labels_of(tmp_path / name) for name in ("numbered", "named", "span")] == [
        [],
        ["a", "b"],
        ["start", "end"],
    ]
    assert load_into(Transformer(config), tmp_path / "span", ["start", "end"]) == []
    assert load_into(Transformer(config), tmp_path / "named", ["start", "end"]) == [
        "classifier.weight",
        "classifier.bias",
    ]
