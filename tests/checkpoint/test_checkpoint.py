from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llm.checkpoint import CheckpointError, disagreements, load, load_into, newest, read, step_name, write
from llm.checkpoint.load import stored
from llm.checkpoint.rng import rng_state, set_rng_state
from llm.config import ConfigError
from llm.model import Transformer, TransformerConfig
from llm.run import run
from tests.runs import Compose


def test_newest_goes_by_the_step_and_not_by_the_clock(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (200_000_000, 900, 1000):
        write(tmp_path / "checkpoints" / step_name(step), {"step": step})
    (tmp_path / "checkpoints" / ".step-99999999.17").mkdir()  # what a crash leaves is not a checkpoint
    (tmp_path / "checkpoints" / "step-99999999x").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-200000000"


def test_write_replaces_as_a_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "file").write_text("1")
    target = tmp_path / "runs" / "step-00000001"
    write(target, {"step": 1}, [extra])
    write(target, {"step": 2}, [])
    assert read(target) == {"step": 2}
    assert sorted(path.name for path in target.parent.iterdir()) == ["step-00000001"]
    assert [path.name for path in target.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("call", ["save", "rename", "fsync"])
def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """ENOSPC, or anything else, at each stage."""
    target = tmp_path / "step-00000001"
    write(target, {"step": 1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    owner = {"save": (torch, "save"), "rename": (Path, "rename"), "fsync": (os, "fsync")}[call]
    with monkeypatch.context() as patch:
        patch.setattr(*owner, fail)
        with pytest.raises(OSError, match="No space left"):
            write(target, {"step": 2})
    assert read(target) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 405440 vs 405328\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot be written \(.*unexpected pos 405440 vs 405328\) - free some space"):
        write(tmp_path / "step-00000001", {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_damage_and_code_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "step-00000001"
    write(target, {"weight": torch.zeros(1000)})
    whole = (target / "state.pt").read_bytes()
    (target / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read .* - remove .*step-00000001 to use an older"):
        read(target)
    position = whole.index(b"\0" * 1000) + 500  # amid the tensor
    (target / "state.pt").write_bytes(whole[:position] + b"\1" + whole[position + 1 :])
    with pytest.raises(CheckpointError, match=r"cannot be read .*checksum of .*data/0"):
        read(target)
    torch.save({"f": os.system}, target / "state.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(target)
    with pytest.raises(CheckpointError, match=r"state\.pt: not there - give a directory"):
        read(tmp_path)


def test_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    draw()
    np.random.randn()  # leaves a cached gaussian behind
    state = rng_state()
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


def test_a_step_directory_stands_alone(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("model.dropout=0"))
    moved = tmp_path / "elsewhere"
    newest(tmp_path / "run").rename(moved)  # type: ignore[union-attr]
    model, tokenizer = load(moved)
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("def f(): ‹ä›")) == "def f(): ‹ä›"
    saved = read(moved)["state_dict"]
    torch.testing.assert_close(model.state_dict(), {n.removeprefix("model."): w for n, w in saved.items()})
    assert yaml.safe_load((moved / "config.yaml").read_text())["model"]["vocab_size"] == model.config.vocab_size


def test_load_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here - give a run directory"):
        load(tmp_path)


def test_load_into_names_every_difference(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run())
    config, _ = stored(newest(tmp_path / "run"))  # type: ignore[arg-type]
    other = Transformer(replace(config, n_layers=3, vocab_size=300))
    with pytest.raises(CheckpointError, match="do not fit this model") as refused:
        load_into(other, tmp_path / "run")
    assert "decoder.blocks.2.attention.query.weight: in the model, not in the checkpoint" in str(refused.value)
    assert "embed.weight: (257, 32) in the checkpoint, (300, 32) in the model" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, r"model\.activation: relu - the weights have relu_squared"),
        ({"norm_eps": 1e-3}, r"model\.norm_eps: 0\.001 - the weights have 1e-05"),
        ({"n_heads": 1}, r"model\.n_heads: 1 - the weights have 2"),
        ({"family": "encoder"}, r"model\.family: encoder - the weights are of a model\.family=decoder - take a model="),
        ({"scale_logits": True}, r"model\.scale_logits: True - the weights have False"),
    ],
)
def test_init_from_refuses_what_gives_equal_shapes_another_meaning(
    compose_run: Compose, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before any data is looked at, and again when the weights are read."""
    run(compose_run("trainer.max_steps=1", "schedule.warmup_steps=0"))
    config, _ = stored(newest(tmp_path / "run"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        load_into(Transformer(replace(config, **changes)), tmp_path / "run")
    if "family" not in changes:
        second = (f"init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'second'}", "data.path=/nowhere")
        with pytest.raises(ConfigError, match=f"init_from: .*: {message}"):
            run(compose_run(*second, *(f"++model.{key}={value}" for key, value in changes.items())))


def test_what_makes_a_context_longer_may_differ(
    compose_run: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(compose_run("trainer.max_steps=1", "schedule.warmup_steps=0"))
    config, _ = stored(newest(tmp_path / "run"))  # type: ignore[arg-type]
    assert load_into(Transformer(replace(config, rope_theta=5e5, max_length=64)), tmp_path / "run") == []
    assert "model.rope_theta: 500000.0, and the weights were trained with 10000.0" in caplog.text


def test_two_embeddings_do_not_become_one(tmp_path: Path) -> None:
    config = TransformerConfig(dim=8, n_layers=1, n_heads=2, vocab_size=20, max_length=8, tie_embeddings=True)
    apart, tied = Transformer(replace(config, tie_embeddings=False)), Transformer(config)
    assert disagreements(tied.config, apart.config) == [
        "model.tie_embeddings: True - the weights have False - set it to that"
    ]
    assert disagreements(apart.config, tied.config) == []


def test_init_from_starts_from_the_weights_and_not_from_the_step(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run())
    cfg = compose_run(
        f"init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'second'}", "trainer.max_steps=3", "optimizer.lr=1e-30"
    )
    assert run(cfg).step == 3
    first, second = (read(newest(tmp_path / name))["state_dict"] for name in ("run", "second"))
    torch.testing.assert_close(first, second)
