"""MANIFEST.json: the size and the SHA-256 of every file of a checkpoint. Written last, so that it is there only if they
all are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm.checkpoint import disk
from llm.checkpoint.disk import Entry

MANIFEST = "MANIFEST.json"


def write(folder: Path, step: int, entries: Mapping[str, Entry]) -> None:
    """Seal a folder that holds the files of `entries`, by path within it."""
    files = {name: entry._asdict() for name, entry in sorted(entries.items())}
    content = {"step": step, "files": files}
    sealed = json.dumps(content | {"sha256": _seal(content)}, indent=1)
    disk.write(folder / MANIFEST, [sealed.encode()])


def problems(folder: Path, step: int | None = None) -> list[str]:
    """One line for each way in which a folder is not what its manifest says; none: it is as it was written.

    Every byte is read, and all files at once, on as many threads as there are cores.

    Args:
        folder: a checkpoint.
        step: which its name says it is of.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        seal = content.pop("sha256")
        expected = {name: Entry(**entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: not there"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: cannot be read ({type(error).__name__})"]
    if seal != _seal(content):
        return [f"{MANIFEST}: was changed"]
    if step is not None and content["step"] != step:
        return [f"{MANIFEST}: is of step {content['step']}"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    strange = [f"{name}: is not in {MANIFEST}" for name in sorted(found - {MANIFEST} - expected.keys())]
    names = sorted(expected, key=lambda name: -expected[name].size)
    with ThreadPoolExecutor(min(len(names) or 1, os.cpu_count() or 1)) as pool:
        lines = pool.map(lambda name: _problem(folder / name, name, expected[name]), names)
        return sorted(line for line in lines if line is not None) + strange


def _problem(file: Path, name: str, expected: Entry) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"{name}: {size} bytes, {MANIFEST} says {expected.size}"
        if disk.read(file) != expected:
            return f"{name}: its content was changed"
    except FileNotFoundError:
        return f"{name}: not there"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    return None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
