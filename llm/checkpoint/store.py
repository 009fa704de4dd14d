"""The checkpoints of a run: one directory per step, verified or not there.

`RUN/checkpoints/step-00001000/` holds `tensors-RANK.safetensors` with `index.json` (weights and optimizer state, in
pieces), `trainer.pt` (plain data and small tensors, read with weights_only), the resolved `config.yaml`, the tokenizer,
and `MANIFEST.json` with the digests of all these, written last. All of it is written beside the final name, synced, and
renamed. Whoever reads a checkpoint verifies every byte first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint import disk, manifest, shards
from llm.checkpoint.disk import Entry

STATE = "trainer.pt"
_STEP = re.compile(r"step-(\d{8,})")
_SPARE = 1 << 24  # bytes that must stay free
log = logging.getLogger(__name__)


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
    """The checkpoint of the highest step under `run_dir`, unverified; None where there is none."""
    return next(reversed(steps(run_dir)), None)


def newest_verified(run_dir: str | Path, up_to: int | None = None) -> Path | None:
    """The checkpoint of the highest step, up to `up_to`, that is as it was written; None where there are none at all.

    Raises:
        CheckpointError: if there are some, and all of them are damaged; not if `up_to` leaves out others.
    """
    found = [step for step in steps(run_dir) if up_to is None or (_step_of(step) or 0) <= up_to]
    lines: list[str] = []
    for step in reversed(found):
        problem = _damage(step)
        if problem is None:
            for line in lines:
                log.warning("%s; going back to %s", line, step.name)
            return step
        lines.append(problem)
    if found and up_to is None:
        raise CheckpointError(
            f"{run_dir}: no checkpoint is whole - copy one back, or start another run\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    return None


def oldest_verified(run_dir: str | Path) -> Path | None:
    """The checkpoint of the lowest step that is as it was written; else as `newest_verified`."""
    whole = (step for step in steps(run_dir) if _damage(step) is None)
    return next(whole, None) or newest_verified(run_dir)


def find(path: str | Path) -> Path:
    """The verified step directory that `path`, a run directory or a step directory, means.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    folder = Path(path)
    if not (folder / manifest.MANIFEST).is_file() and not (folder / STATE).is_file():
        step = newest_verified(folder)
        if step is None:
            raise CheckpointError(f"{path}: no checkpoint here - give a run directory or one of its checkpoints/step-*")
        return step
    problem = _damage(folder)
    if problem is not None:
        raise CheckpointError(f"{problem} - copy it again, or give another checkpoint")
    return folder


def set_aside_damaged(run_dir: str | Path, good: Path) -> None:
    """Rename the checkpoints after `good` to damaged-step-…: the run is about to write these steps again."""
    for step in steps(run_dir):
        if step.name > good.name:
            disk.remove(step.with_name(f"damaged-{step.name}"))
            disk.move(step, step.with_name(f"damaged-{step.name}"))


def unused(out: str | Path) -> Path:
    """`out`, where nothing is yet. Raises CheckpointError if something is."""
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: is there already - give a folder that is not")
    return out


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    attachments: Iterable[Path] = (),
    group: dist.ProcessGroup | None = None,
    *,
    background: bool = False,
) -> Future[None]:
    """Save a checkpoint as `directory`; a crash at any point leaves it verified or absent. Collective over `group`.

    Args:
        directory: final name; a directory of that name is replaced, as it is none that verifies.
        tensors: this process's, or its part of those spread over processes; each as its owner has it.
        state: plain data; what the first process gives is written.
        attachments: files or folders to copy in, by the first process.
        background: return when the tensors are copied to the host, and write in a thread; every process calls `result`
            of what is returned before it saves again.

    Raises:
        OSError: on every process, if one cannot write or the first sees too little space; from `result` if in the
            background. What was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    temporary = directory.with_name(f".{directory.name}")
    step = _step_of(directory) or 0

    def seal(entries: dict[str, Entry]) -> None:
        entries[STATE] = disk.write(temporary / STATE, [buffer.getbuffer()])
        for source in attachments:
            entries |= disk.copy(source, temporary)
        manifest.write(temporary, step, entries)
        disk.sync(temporary)
        if directory.exists():
            disk.remove(directory)
        disk.move(temporary, directory)

    def room(n_bytes: int) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        disk.remove(temporary)  # of a save that failed or was killed
        wanted, free = n_bytes + len(buffer.getbuffer()) + _SPARE, shutil.disk_usage(directory.parent).free
        if free < wanted:
            needs = f"needs {wanted / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
            raise OSError(errno.ENOSPC, f"a checkpoint {needs}: free some space", str(directory))

    def tidy() -> None:
        with contextlib.suppress(OSError):  # several processes may do this
            disk.remove(temporary)

    return shards.save(tensors, temporary, shards.Phases(room, seal, tidy), group, background=background)


def read_state(directory: Path) -> dict[str, Any]:
    """The plain data of a checkpoint.

    Raises:
        CheckpointError: if it cannot be read, or holds anything but tensors and plain data.
    """
    file = directory / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {reason}) - give another checkpoint"
        ) from error


def read_tensors(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with `prefix`, whole, on the CPU."""
    return shards.read(directory, prefix)


def remove(directory: Path) -> None:
    """Delete a checkpoint that retention no longer wants: never the newest, which a run may have to go on from."""
    newest = max((path.name for path in directory.parent.glob("step-*")), default=directory.name)
    if directory.name != newest:
        disk.remove(directory)


def remove_after(directory: Path) -> None:
    """Delete the checkpoints of later steps: a run has gone back to this one, and they are of what it undoes."""
    for step in steps(directory.parents[1]):
        if step.name > directory.name:
            disk.remove(step)


def sweep(run_dir: str | Path) -> None:
    """Delete what crashes have left; only who holds the run's lock may."""
    with contextlib.suppress(OSError):
        disk.sweep(Path(run_dir) / "checkpoints")


def _damage(step: Path) -> str | None:
    """What is wrong with a checkpoint, in one line that names the files."""
    lines = manifest.problems(step, _step_of(step))
    return f"{step}: damaged: {'; '.join(lines)}" if lines else None


def _step_of(directory: Path) -> int | None:
    """The step that a directory's name says."""
    match = _STEP.fullmatch(directory.name)
    return None if match is None else int(match[1])
