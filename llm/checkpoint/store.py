"""The checkpoints of a run: one directory per step, complete or not there.

`RUN/checkpoints/step-00001000/` holds `state.pt` (plain data and tensors, read with weights_only), the resolved
`config.yaml` and the tokenizer, so that a step directory can be used alone. It is written beside its final name,
synced, and renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""

    exit_code = 74


def step_name(step: int) -> str:
    """Name of a step's directory; zeros make the alphabetical order that of the steps."""
    return f"step-{step:08d}"


def steps(run_dir: str | Path) -> list[Path]:
    """The checkpoints under `run_dir` by rising step: by name and not by a clock."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(run_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step under `run_dir`; None where there is none."""
    return next(reversed(steps(run_dir)), None)


def find(path: str | Path) -> Path:
    """The step directory that `path`, a run directory or a step directory, means.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(path)
    step = folder if (folder / STATE).is_file() else newest(folder)
    if step is None:
        raise CheckpointError(f"{path}: no checkpoint here - give a run directory or one of its checkpoints/step-*")
    return step


def write(directory: Path, state: dict[str, Any], attachments: Iterable[Path] = ()) -> None:
    """Save `state` and copies of `attachments` as `directory`; a crash at any point leaves it whole or absent.

    Args:
        directory: final name; replaced as a whole if it exists.
        state: tensors and plain data.
        attachments: files or folders to copy in.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _save(state, temporary / STATE)
        for source in attachments:
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, temporary / source.name)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        with _moved_away(directory):
            temporary.rename(directory)
            _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(directory: Path) -> dict[str, Any]:
    """The state in a step directory, tensors on the CPU and mapped from the file.

    Raises:
        CheckpointError: if the file is damaged, or holds anything but tensors and plain data.
    """
    file = directory / STATE
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums that torch.save writes
        if damaged is not None:
            raise ValueError(f"checksum of {damaged}")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not there - give a directory that holds a {STATE}") from None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {first_line}) - "
            f"remove {directory} to use an older checkpoint"
        ) from error


@contextlib.contextmanager
def _moved_away(directory: Path) -> Iterator[None]:
    """Make room for a directory of the same name; the old one goes only after the new one is in place."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    try:
        yield
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _save(state: dict[str, Any], path: Path) -> None:
    """torch.save; a full disk, which torch reports as a RuntimeError, is an OSError."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path.parent}: cannot be written ({reason}) - free some space") from error


def _sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
