"""A crash at any point of saving and of retention leaves the old checkpoint or the new one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.checkpoint import remove, save, set_aside_damaged, step_name, sweep
from tests.checkpoint.crash_points import survivors, survivors_of_ranks
from tests.ranks import run_on_ranks


def write(run_dir: Path, step: int, *, background: bool = False) -> None:
    if not (run_dir / "config.yaml").exists():
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.yaml").write_text("model: {}\n")
        (run_dir / "tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (run_dir / "tokenizer" / name).write_text("{}")
    tensors = {"weight": torch.full((40, 7), float(step)), "number": torch.tensor(step)}
    directory = run_dir / "checkpoints" / step_name(step)
    save(
        directory, tensors, {"step": step}, [run_dir / "config.yaml", run_dir / "tokenizer"], background=background
    ).result()


def two(run_dir: Path) -> None:
    for step in (1, 2):
        write(run_dir, step)


def damaged(run_dir: Path) -> None:
    for step in (1, 2, 3):
        write(run_dir, step)
    (run_dir / "checkpoints" / step_name(3) / "trainer.pt").write_bytes(b"")


def with_retention(run_dir: Path, *, background: bool) -> None:
    write(run_dir, 3, background=background)
    for step in (1, 2) if not dist.is_initialized() or dist.get_rank() == 0 else ():
        remove(run_dir / "checkpoints" / step_name(step))


def with_set_aside(run_dir: Path, *, background: bool = False) -> None:
    sweep(run_dir)
    set_aside_damaged(run_dir, run_dir / "checkpoints" / step_name(2))
    write(run_dir, 3, background=background)


def of_a_small_process(function: Callable[..., list[int | None]], *args: Any) -> list[int | None]:
    """What `function` finds in a process that has no pages of pytest's to copy for each child."""
    (found,) = run_on_ranks(without_group, 1, function, *args)
    return found


def without_group(function: Callable[..., list[int | None]], *args: Any) -> list[int | None]:
    dist.destroy_process_group()  # its threads are in no child
    return function(*args)


@pytest.mark.parametrize("background", [False, True])
def test_saving_and_retention(tmp_path: Path, background: bool) -> None:
    found = of_a_small_process(survivors, tmp_path, two, partial(with_retention, background=background))
    assert len(found) > 40
    assert set(found) == {2, 3}
    assert found == sorted(found), "once the new one is there, it stays"


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes(tmp_path: Path, rank: int) -> None:
    found = of_a_small_process(survivors_of_ranks, tmp_path, two, partial(with_retention, background=False), rank)
    assert set(found) == ({2, 3} if rank == 0 else {2}), "only the first names it"


def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    found = of_a_small_process(survivors, tmp_path, damaged, with_set_aside)
    assert len(found) > 30
    assert set(found) == {2, 3}


def test_the_first_of_all(tmp_path: Path) -> None:
    found = of_a_small_process(survivors, tmp_path, Path.mkdir, partial(write, step=1))
    assert set(found) == {None, 1}
    assert found == sorted(found, key=lambda step: step or 0)
