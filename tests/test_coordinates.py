"""`python -m llm coordinates`: mup passes for every family and optimizer, the standard parametrization does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.__main__ import main
from llm.build import build
from llm.callback.coordinates import Coordinates, Size
from llm.config import ConfigError
from llm.coordinates import Check, at_width, check, table, write
from llm.model import TransformerConfig
from llm.run import settled
from tests.runs import FAMILIES, TINY, Compose

# Layer norm and no biases, as the tiny models have; the learning rates are near the best of such networks.
SETTINGS = [*TINY, "model.n_heads=4", "model.dropout=0", "data.batch_size=4", "data.micro_batch_size=null"]
MUP = ["model.parametrization=mup", "model.base_dim=32"]
RATES = {"adamw": "optimizer.lr=2e-3", "muon": "optimizer.lr=1e-2"}


@pytest.fixture
def command(corpus: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    places = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}"]
    return ["coordinates", "--widths", "32,64,128", "--steps", "3", "--out", str(tmp_path / "out"), *SETTINGS, *places]


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [("decoder", "adamw"), ("encoder", "muon"), ("encoder-decoder", "adamw")],
)
def test_mup_passes(
    family: str, optimizer: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, *FAMILIES.get(family, []), f"optimizer={optimizer}", RATES[optimizer], *MUP])
    printed = capsys.readouterr().out
    assert "coordinates.png: model.parametrization=mup: passed" in printed
    found = json.loads((tmp_path / "out" / "coordinates.json").read_text())
    assert found["passed"]
    parts = [slope["part"] for slope in found["slopes"]]
    assert parts[0] == "embed"
    assert parts[-1] == "logits"
    assert all(part in printed for part in parts)
    assert (tmp_path / "out" / "coordinates.png").stat().st_size > 10_000
    assert not (tmp_path / "run").exists(), "it leaves no run"


def test_the_standard_parametrization_does_not(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "optimizer=muon", RATES["muon"]])
    assert left.value.code == 1
    assert "model.parametrization=standard: NOT PASSED" in capsys.readouterr().out
    slopes = json.loads((tmp_path / "out" / "coordinates.json").read_text())["slopes"]
    blocks = [slope for slope in slopes if ".blocks." in slope["part"]]
    assert {slope["problem"] for slope in blocks} == {"grows with the width"}
    assert min(slope["change"] for slope in blocks) > 0.4


def test_a_run_that_diverges_does_not_pass(compose_run: Compose, tmp_path: Path) -> None:
    cfg = compose_run("optimizer.lr=1e30", "optimizer.weight_decay=0")
    found = check(cfg, [16, 32], 3, 1, lambda line: None)
    assert not found.passed
    assert "diverges" in table(found)
    write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "coordinates.json").read_text())["passed"] is False


def test_to_look_changes_nothing(compose_run: Compose) -> None:
    """With dropout on: what is looked at draws nothing."""
    weights = []
    for looking in (True, False):
        cfg = compose_run("~callback.checkpoint", "trainer.max_steps=3", "trainer.limit_val_batches=0")
        data, _ = settled(cfg)
        data.prepare()
        trainer, objective = build(cfg)
        seen = Coordinates()
        trainer.callbacks = [seen] if looking else []  # type: ignore[attr-defined]
        trainer.fit(objective, datamodule=data)
        weights.append({name: weight.clone() for name, weight in objective.network.state_dict().items()})
        assert len(seen.sizes) == (4 if looking else 0)
    assert all(size.change == 0 for size in seen.sizes[0].values()) if seen.sizes else True
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@given(powers=st.tuples(*[st.floats(-2, 2)] * 3))
def test_slopes_are_the_powers_of_the_width(powers: tuple[float, float, float]) -> None:
    start, end, change = powers
    sizes = {width: [Size(3 * width**start, 0.0), Size(width**end, width**change / 7)] for width in (32, 64, 256)}
    found = Check("mup", 64, [32, 64, 256], 1, 1, {"logits": sizes})
    (slope,) = found.slopes
    assert slope[1:] == pytest.approx(powers, abs=1e-9)
    assert found.passed == (max(powers) <= 0.4 and change >= -0.5) or min(
        abs(max(powers) - 0.4), abs(change + 0.5)
    ) == pytest.approx(0, abs=1e-6)


def test_what_shrinks_is_told() -> None:
    sizes = {width: [Size(1.0, 0.0), Size(1.0, 1 / width)] for width in (32, 64)}
    assert "learns less with the width" in table(Check("mup", 64, [32, 64], 1, 1, {"embed": sizes}))
    sizes = {width: [Size(math.inf, 0.0), Size(1.0, 1.0)] for width in (32, 64)}
    assert "diverges" in table(Check("mup", 64, [32, 64], 1, 1, {"embed": sizes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_heads": 4}, {"dim": 128, "n_heads": 4, "head_width": 32, "ffn_width": 512}),
        ({"n_heads": 4, "ffn_dim": 100}, {"head_width": 32, "ffn_width": 200}),
        ({"n_heads": 4, "head_dim": 16, "n_kv_heads": 2}, {"n_heads": 8, "kv_heads": 4, "head_width": 16}),
    ],
)
def test_every_width_grows_or_heads_are_added(changes: dict[str, Any], expected: dict[str, int]) -> None:
    model = TransformerConfig(**({"dim": 64, "n_layers": 1, "max_length": 8, "activation": "relu"} | changes))
    found = at_width(model, 128)
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "32"], "--widths 32: give two or more, as 32,64,128,256"),
        (["--widths", "32,x"], "--widths 32,x: give two or more"),
        (["--widths", "0,32"], "--widths 0,32: give two or more"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--seeds", "-1"], "--seeds -1: give at least 1"),
        (
            ["model.paramterization=mup"],
            "model.paramterization: mup - no such key - did you mean model.parametrization?",
        ),
        (["model.parametrization=mup"], "model.base_dim = None: model.parametrization=mup scales from"),
        (["init_from=FOLDER"], "init_from: FOLDER - coordinates are checked from the first weights on - leave it out"),
        (
            ["--widths", "30,60", "+model.head_dim=8", "model.n_heads=4"],
            "--widths: 30 - is 0.9375 of model.dim=32, and so much of model.n_heads=4 is no whole "
            "number - take other widths",
        ),
        (["--widths", "18,36", "model.ffn_dim=null"], "--widths: 18 - model.n_heads = 4: must divide model.dim = 18"),
        (["objective=masked_lm"], "objective: trains a model.family=encoder - the model has decoder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [text.lstrip("+") for text in arguments]
    with pytest.raises(SystemExit) as left:
        main([*command, *arguments])
    assert left.value.code == 64
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_an_adapter_has_no_first_weights(compose_run: Compose) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter: llm\.adapter\.Lora - coordinates are checked from the first weights on"
    ):
        check(compose_run("adapter=lora"), [16, 32], 1, 1)
