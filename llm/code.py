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
    described = _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if described is None:
        return None
    name = described.strip()
    return f"{name}-dirty" if _untracked(root) and not name.endswith("-dirty") else name


def difference(root: Path = ROOT) -> str:
    """How files differ from the commit, as a patch that git applies, with new ones; "" if they do not, or nobody
    knows."""
    plain = ("--binary", "--no-color", "--no-ext-diff")
    patch = _git(root, "diff", *plain, "HEAD", "--", *_PARTS) or ""
    for name in _untracked(root):
        patch += _git(root, "diff", *plain, "--no-index", "--", "/dev/null", name, code=1) or ""
    return patch


def _untracked(root: Path) -> list[str]:
    """Files of the code that git does not know, and is not told to ignore."""
    found = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_PARTS)
    return [name for name in (found or "").split("\0") if name]


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


def _git(root: Path, *arguments: str, code: int = 0) -> str | None:
    """What git prints; None if it is not there, or ends with another exit code."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == code else None
