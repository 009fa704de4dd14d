"""Files and directories that a crash or a power loss leaves whole or absent."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_CHUNK = 1 << 24
_REMOVED = ".removed"


class Entry(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str  # as sha256sum prints it


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> Entry:
    """Write a new file and sync it; its digest is taken on the way."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            left = memoryview(chunk).cast("B")
            digest.update(left)
            size += len(left)
            while left:
                left = left[os.write(descriptor, left[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Entry(size, digest.hexdigest())


def read(path: Path) -> Entry:
    """What a manifest has to say of the file as it is."""
    with open(path, "rb", buffering=0) as file:
        return Entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def copy(source: Path, folder: Path) -> dict[str, Entry]:
    """Copy a file or a folder into `folder`, synced; what was written, by path within it."""
    if source.is_dir():
        make(folder / source.name)
        made = [copy(path, folder / source.name) for path in sorted(source.iterdir())]
        sync(folder / source.name)
        return {f"{source.name}/{name}": entry for entries in made for name, entry in entries.items()}
    return {source.name: write(folder / source.name, _chunks(source))}


def make(folder: Path) -> None:
    """Make a directory that is not there."""
    os.mkdir(folder)


def sync(folder: Path) -> None:
    """Make a directory's entries survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(folder: Path, target: Path) -> None:
    """Give a directory its name, for good."""
    os.rename(folder, target)
    sync(target.parent)


def remove(folder: Path) -> None:
    """Delete a directory: its name goes at once, what is in it after that."""
    gone = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(4)}{_REMOVED}")
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    _delete(gone)


def sweep(parent: Path) -> None:
    """Delete what crashes have left in `parent`: hidden directories, half written or half deleted."""
    for path in sorted(parent.glob(".*")) if parent.is_dir() else []:
        if path.is_dir():
            _delete(path)


def _delete(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            _delete(path)
        else:
            os.unlink(path)
    os.rmdir(folder)


def _chunks(source: Path) -> Iterator[bytes]:
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
