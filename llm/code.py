"""Which code this is: its commit, how its files differ from that, and a copy of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PARTS = ("train.py", "conf", "llm", "slurm")
_MARK = "COMMIT"  # in a copy: the commit that it was taken from


def commit(root: Path = ROOT) -> str | None:
    """The commit of the code, with `-dirty` if files differ from it; None outside a git checkout."""
    if (root / _MARK).is_file():
        return (root / _MARK).read_text().strip() or None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def difference(root: Path = ROOT) -> str:
    """How files differ from the commit, as a patch; "" if they do not, or nobody knows."""
    return _git(root, "diff", "HEAD", "--", *_PARTS) or ""


def copy_code(folder: Path, root: Path = ROOT) -> None:
    """Copy what a run is made of; the copy knows its commit."""
    folder.mkdir(parents=True)
    for name in _PARTS:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.is_file():
            shutil.copy2(source, folder / name)
    (folder / _MARK).write_text(f"{commit(root) or ''}\n")


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
