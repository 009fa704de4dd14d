"""Heads for labels, tags and spans: the same scores in transformers, and the same weights back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from llm.checkpoint import huggingface, weights_of
from llm.model import Transformer, TransformerConfig

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
