"""The configuration: what it refuses, what its nulls come to, and that it costs no torch."""

import re
import subprocess
import sys
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from llm.model import TransformerConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"dim": 64, "n_heads": 5},
            "model.n_heads = 5: must divide model.dim = 64; take one of 1, 2, 4, 8, 16, 32, 64, or set model.head_dim",
        ),
        (
            {"n_heads": 4, "n_kv_heads": 3},
            "model.n_kv_heads = 3: must divide model.n_heads = 4, each key/value head serving as many queries; "
            "take one of 1, 2, 4",
        ),
        (
            {"head_dim": 7},
            "model.head_dim = 7: must be even, as rotary positions turn pairs of channels; "
            "change model.head_dim or model.n_heads, or take model.position=learned",
        ),
        (
            {"dim": 33, "head_dim": 8, "position": "sinusoidal"},
            "model.dim = 33: must be even, as sinusoidal positions are pairs of sine and cosine; take 34",
        ),
        ({"n_layers": 0}, "model.n_layers = 0: must be at least 1"),
        ({"vocab_size": -1}, "model.vocab_size = -1: must be at least 1"),
    ],
)
def test_refuses(config, overrides, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(**overrides)


def test_all_mistakes_at_once(config):
    with pytest.raises(ValueError, match=r"^model\.n_heads = 5: .*\nmodel\.n_kv_heads = 3: [^\n]*$"):
        config(n_heads=5, n_kv_heads=3)


def test_odd_heads_are_fine_without_rotation(config):
    assert config(head_dim=7, position="learned").head_width == 7


def test_nulls(config):
    plain = config(dim=96, n_heads=4, activation="gelu")
    assert (plain.kv_heads, plain.head_width, plain.ffn_width) == (4, 24, 384)
    gated = config(dim=96, n_heads=4, activation="swiglu")
    assert gated.ffn_width == 256  # 8/3 of 96, a multiple of 64 already
    assert config(dim=4096, n_heads=32).ffn_width == 10944  # 10922.67 rounded up
    given = config(n_kv_heads=2, head_dim=6, ffn_dim=10)
    assert (given.kv_heads, given.head_width, given.ffn_width) == (2, 6, 10)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("dim", 8, 0),
        ("vocab_size", None, 0),
        ("dropout", 0.0, 1.0),
        ("norm_eps", 1e-6, 0.0),
        ("rope_theta", 1e4, -1.0),
        ("activation", "swiglu", "swish"),
        ("position", "learned", "alibi"),
    ],
)
def test_ranges_are_in_the_hints(key, good, bad):
    """The check of a whole configuration reads them there (llm.config)."""
    hint = TypeAdapter(get_type_hints(TransformerConfig, include_extras=True)[key])
    assert hint.validate_python(good) == good
    with pytest.raises(ValidationError):
        hint.validate_python(bad)


def test_two_parts_of_a_pair_need_two_segments():
    with pytest.raises(ValueError, match=r"model\.n_segments = 1: model\.next_sentence tells two parts apart"):
        TransformerConfig(
            dim=8, n_layers=1, n_heads=2, max_length=8, family="encoder", next_sentence=True, n_segments=1
        )


def test_every_number_has_a_range():
    for key, hint in get_type_hints(TransformerConfig, include_extras=True).items():
        parts = [hint, *get_args(hint)]
        if int in parts or float in parts:
            assert get_origin(hint) is Annotated, f"{key} has no range"


def test_imports_no_torch():
    code = "import llm.model, llm.model.config, sys; assert 'torch' not in sys.modules; llm.model.Transformer"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name():
    import llm.model

    with pytest.raises(AttributeError, match=r"module 'llm\.model' has no attribute 'Transfomer'"):
        _ = llm.model.Transfomer
