from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import torch as safetensors

from llm.checkpoint import (
    CheckpointError,
    disagreements,
    disk,
    find,
    load,
    load_into,
    load_tensors,
    newest,
    newest_verified,
    read_state,
    read_tensors,
    remove,
    save,
    set_aside_damaged,
    step_name,
    sweep,
    weights_of,
)
from llm.checkpoint.load import stored
from llm.checkpoint.rng import rng_state, set_rng_state
from llm.config import ConfigError
from llm.model import Transformer, TransformerConfig
from llm.run import run
from tests.runs import Compose, saved


def write(directory: Path, step: int, attachments: Sequence[Path] = ()) -> None:
    save(directory, {"weight": torch.full((3, 4), float(step)), "n": torch.tensor(step)}, {"step": step}, attachments)


def test_newest_goes_by_the_step_and_not_by_the_clock(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (200_000_000, 900, 1000):
        write(tmp_path / "checkpoints" / step_name(step), step)
    (tmp_path / "checkpoints" / ".step-99999999").mkdir()  # what a crash leaves is not a checkpoint
    (tmp_path / "checkpoints" / "step-99999999x").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-200000000"
    assert newest_verified(tmp_path) == newest(tmp_path)


def test_a_checkpoint_is_what_was_saved_and_nothing_else(tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    (extra / "folder").mkdir(parents=True)
    (extra / "folder" / "file").write_text("1")
    target = tmp_path / "runs" / "step-00000002"
    write(target, 1)
    write(target, 2, [extra])
    assert read_state(target) == {"step": 2}
    assert {name: value.tolist() for name, value in read_tensors(target).items()} == {"weight": [[2.0] * 4] * 3, "n": 2}
    assert (target / "extra" / "folder" / "file").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["step-00000002"]
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    expected = ["MANIFEST.json", "extra/folder/file", "index.json", "tensors-00000.safetensors", "trainer.pt"]
    assert files == expected
    listed = json.loads((target / "MANIFEST.json").read_text())["files"]
    assert sorted(listed) == expected[1:]
    for name, entry in listed.items():
        assert entry["sha256"] == hashlib.sha256((target / name).read_bytes()).hexdigest()


def test_the_tensors_are_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(5, 3),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "bits": torch.tensor([True, False, True]),
        "slice": torch.randn(6, 6).T[1:4],
    }
    save(tmp_path / "step-00000001", tensors, {})
    torch.testing.assert_close(safetensors.load_file(tmp_path / "step-00000001" / "tensors-00000.safetensors"), tensors)
    torch.testing.assert_close(read_tensors(tmp_path / "step-00000001"), tensors)
    filled = {name: torch.zeros_like(value) for name, value in tensors.items()}
    load_tensors(filled, tmp_path / "step-00000001")
    torch.testing.assert_close(filled, tensors)


@pytest.mark.parametrize("call", ["write", "rename", "fsync", "mkdir"])
@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_keeps_the_old_checkpoint_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, background: bool
) -> None:
    """EIO at each stage."""
    write(tmp_path / "step-00000001", 1)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            patch.undo()
            raise OSError(5, "Input/output error")

        patch.setattr(*((disk, "make") if call == "mkdir" else (os, call)), fail)
        with pytest.raises(OSError, match="Input/output error"):
            save(tmp_path / "step-00000002", {"a": torch.ones(9)}, {}, background=background).result()
    assert newest_verified(tmp_path.parent) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_state(find(tmp_path / "step-00000001")) == {"step": 1}


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"a checkpoint needs 0\.02 GB, and 0\.01 GB are free: free some space"):
        write(tmp_path / "step-00000001", 1)
    assert list(tmp_path.iterdir()) == []


Damage = Callable[[Path, Path], None]


def _truncated(step: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _bit_flipped(step: Path, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _zeroed(step: Path, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def _missing(step: Path, file: Path) -> None:
    file.unlink()


def _from_another_step(step: Path, file: Path) -> None:
    file.write_bytes((step.with_name("step-00000001") / file.relative_to(step)).read_bytes())


def _one_too_many(step: Path, file: Path) -> None:
    file.with_name("more").write_bytes(b"")


FILES = ["MANIFEST.json", "index.json", "tensors-00000.safetensors", "trainer.pt", "note/text"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", [_truncated, _bit_flipped, _zeroed, _missing, _from_another_step, _one_too_many], ids=lambda f: f.__name__
)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage, file: str
) -> None:
    (tmp_path / "note").mkdir()
    folder = tmp_path / "checkpoints"
    first, second = (folder / step_name(step) for step in (1, 2))
    for step, name in ((1, "first"), (2, "second")):
        (tmp_path / "note" / "text").write_text(f"{name}: a text of some length")
        tensors = {name: torch.full((30,), float(step))}
        save(folder / step_name(step), tensors, {"step": step}, [tmp_path / "note"])
    damage(second, second / file)
    with caplog.at_level(logging.WARNING):
        assert newest_verified(tmp_path) == first
    assert ("more" if damage is _one_too_many else Path(file).name) in caplog.text
    assert "going back to step-00000001" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-00000002: damaged: .* - copy it again"):
        find(second)
    (first / file).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole") as refused:
        newest_verified(tmp_path)
    assert str(refused.value).count("damaged: ") == 2


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001", 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: is of step 1"):
        find(tmp_path / "step-00000003")
    (tmp_path / "step-00000003").rename(tmp_path / "copied")
    assert find(tmp_path / "copied") == tmp_path / "copied"


def test_code_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001", 1)
    torch.save({"f": os.system}, tmp_path / "step-00000001" / "trainer.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match=r"trainer\.pt: cannot be read \(UnpicklingError"):
        read_state(tmp_path / "step-00000001")


def test_damaged_ones_are_set_aside_and_remains_swept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write(folder / step_name(step), step)
    (folder / ".step-00000004" / "deep").mkdir(parents=True)
    (folder / "step-00000002" / "trainer.pt").unlink()
    (folder / "step-00000003" / "index.json").unlink()
    good = newest_verified(tmp_path)
    assert good is not None
    set_aside_damaged(tmp_path, good)
    sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged-step-00000002",
        "damaged-step-00000003",
        "step-00000001",
    ]


def test_the_newest_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / step_name(step), step)
    for step in (2, 1):
        remove(tmp_path / step_name(step))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


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
    torch.testing.assert_close(
        weights_of(model), {n.removeprefix("model."): w for n, w in read_tensors(moved, "model.").items()}
    )
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
    for window, was in ((8, 16), (None, 16), (16, None)):
        caplog.clear()
        assert disagreements(replace(config, window=window), replace(config, window=was)) == []
        assert f"model.window: {window}, and the weights were trained with {was}" in caplog.text


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
    first, second = (saved(tmp_path / name)["state_dict"] for name in ("run", "second"))
    torch.testing.assert_close(first, second)
