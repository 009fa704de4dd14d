"""A disk that is full or broken in the midst of a run, a damaged checkpoint at its start, and what a run keeps."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint import disk, newest_verified
from llm.exit import exit_code
from llm.lock import LockedError, locked
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed, saved


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 cannot be written."""
    write = disk.write

    def refuse(path: Path, *args: Any) -> disk.Entry:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args)

    monkeypatch.setattr(disk, "write", refuse)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_a_checkpoint_or_ends_the_run(
    compose_run: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    settings = ("callback.checkpoint.every_n_train_steps=2", f"callback.checkpoint.background={background}")
    with pytest.raises(OSError, match="No space left") as ended:
        run(compose_run(*settings))
    assert exit_code(ended.value) == 74
    assert names(tmp_path / "run") == ["step-00000002"]
    assert newest_verified(tmp_path / "run") is not None
    with caplog.at_level(logging.WARNING):
        outcome = run(compose_run(*settings, "callback.checkpoint.on_error=warn"))
    assert outcome.step == 6
    assert "was not saved, and the run goes on without it: " in caplog.text
    assert names(tmp_path / "run") == ["step-00000006"]


def test_a_damaged_checkpoint_is_gone_back_from(
    compose_run: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("callback.checkpoint.every_n_train_steps=2", "callback.checkpoint.save_top_k=-1", "schedule=constant")
    run(compose_run(*settings))
    whole = saved(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    file = next(last.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "run" / "exit.json").unlink()
    with caplog.at_level(logging.WARNING):
        run(compose_run(*settings))
    assert f"{file.name}: its content was changed; going back to step-00000004" in caplog.text
    assert names(tmp_path / "run")[0] == "damaged-step-00000006"
    again = saved(tmp_path / "run")
    assert all((again["state_dict"][name] == value).all() for name, value in whole["state_dict"].items())


@pytest.mark.parametrize("background", [False, True])
def test_what_is_kept(compose_run: Compose, tmp_path: Path, background: bool) -> None:
    run(
        compose_run(
            "callback.checkpoint.every_n_train_steps=1",
            "callback.checkpoint.save_top_k=2",
            "callback.checkpoint.keep_every_n_steps=3",
            f"callback.checkpoint.background={background}",
            "trainer.max_steps=8",
        )
    )
    assert names(tmp_path / "run") == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_two_runs_in_one_directory(compose_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        run(compose_run())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert run(compose_run()).step == 6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_save_in_the_background(corpus: Path, cache_dir: Path, tmp_path: Path, strategy: str) -> None:
    """Each its part, and the same bits as a run that waits."""
    settings = [
        f"strategy={strategy}",
        "trainer.devices=2",
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        "data.micro_batch_size=2",
        "callback.checkpoint.every_n_train_steps=2",
        "~callback.sample",
    ]
    for background in (False, True):
        more = [f"run_dir={tmp_path / str(background)}", f"callback.checkpoint.background={background}"]
        run_on_ranks(run_composed, 2, [*settings, *more])
    one, two = (saved(tmp_path / name) for name in ("False", "True"))
    for kind in ("state_dict", "optimizer"):
        assert one[kind].keys() == two[kind].keys()
        assert all((two[kind][name] == value).all() for name, value in one[kind].items())
    step = newest_verified(tmp_path / "True")
    assert step is not None
    sizes = [path.stat().st_size for path in sorted(step.glob("*.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes), "replicas share the writing"
