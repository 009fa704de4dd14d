"""Folders that are made once: named by what went into them, there in whole or not at all, and checked when found."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

META = "meta.json"
# Part of every key. Raised whenever the files or the way to them change: older caches are then made anew.
FORMAT = 4
_OURS = re.compile(
    r"(?P<name>(tokenizer|tokens|rows|examples)-[0-9a-f]{16}|share-[0-9a-f]{16}-\d+of\d+)"
    r"(?P<rest>\.lock|\.tmp-(?P<host>[^ ]+)-(?P<pid>\d+)-[0-9a-f]{8})?"
)
_log = logging.getLogger(__name__)


class OvertakenError(Exception):
    """Raised by the builder of a folder that finds it made by another process in the meantime: that one is taken."""


class MissingError(Exception):
    """Raised in `only_found` for a folder that has not been made."""


_make = True  # what is not there; see `only_found`


@contextmanager
def only_found() -> Iterator[None]:
    """Inside, `cached` makes nothing: what is not there is a MissingError."""
    global _make
    before, _make = _make, False
    try:
        yield
    finally:
        _make = before


@dataclass(frozen=True)
class Cache:
    """One finished folder: its path, what it says about itself, and its size in bytes."""

    path: Path
    meta: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.path.name.split("-")[0]

    @property
    def n_bytes(self) -> int:
        return sum(self.meta["files"].values())


def cached(root: Path, kind: str, key: str, build: Callable[[Path], dict[str, Any]]) -> Cache:
    """The folder `root/kind-key`, built by `build(folder) -> meta` unless an intact one is there.

    It is built under another name and renamed when complete, so that a killed process leaves nothing that could be
    taken for it; of two processes one builds and the other waits (or, where the file system has no locks, the first
    rename wins). `build` may raise OvertakenError if the folder is there by now. Raises OSError naming data.cache_dir
    when the place cannot be written.
    """
    final = root / f"{kind}-{key}"
    try:
        found = _intact(final)
        if found is not None:
            return found
        if not _make:
            raise MissingError(str(final))
        root.mkdir(parents=True, exist_ok=True)
        with _locked(final):
            found = _intact(final)
            return _build(final, build) if found is None else found
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(root)):
            raise  # a source that cannot be read, not the cache
        raise OSError(
            error.errno,
            f"data.cache_dir={root}: {error.strerror or error}; free some space or set another data.cache_dir",
        ) from error


def find(root: Path, kind: str, key: str) -> Cache | None:
    """The folder `root/kind-key`, if it is there and intact."""
    return _intact(root / f"{kind}-{key}")


def staged(cache: Cache, root: Path) -> Cache:
    """A copy below `root`, made once, there in whole or not at all: the own disk of a node, for one that all share."""
    kind, _, key = cache.path.name.partition("-")

    def copy(folder: Path) -> dict[str, Any]:
        for name in cache.meta["files"]:
            shutil.copyfile(cache.path / name, folder / name)
        return {name: value for name, value in cache.meta.items() if name != "files"}

    return cached(root, kind, key, copy)


def caches(root: Path) -> list[Cache]:
    """Every intact cache below `root`, by name."""
    folders = sorted(path for path in root.glob("*-*") if _OURS.fullmatch(path.name) and path.is_dir())
    return [found for found in map(_intact, folders) if found is not None]


def remove_caches(root: Path, pattern: str = "*-*") -> int:
    """Delete all caches below `root`, or those whose names fit `pattern`, left-overs of killed processes included;
    returns the bytes freed.

    What another process is at work on just now stays, and so do files that are none of ours.
    """
    ours: dict[str, list[Path]] = {}
    for path in sorted(root.glob(pattern)):
        if match := _OURS.fullmatch(path.name):
            ours.setdefault(match["name"], []).append(path)
    freed = 0
    for name, paths in ours.items():
        try:
            with _locked(root / name, wait=False):
                for path in paths:
                    with suppress(FileNotFoundError):  # without locks, two may delete the same at once
                        inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                        freed += sum(file.stat().st_size for file in inside)
                    _remove(path)
                _remove(root / f"{name}.lock")
        except BlockingIOError:
            _log.warning("%s: another process is at work on this; it stays", root / name)
    return freed


def _intact(folder: Path) -> Cache | None:
    """The cache in `folder`, if every file that its meta.json names is there in full."""
    found = _look(folder)
    return found if isinstance(found, Cache) else None


def _look(folder: Path) -> Cache | str:
    """The cache in `folder`, or what is wrong with it."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                return f"{name} is not {size} bytes long"
        return Cache(folder, meta)
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{META}: {error}"


def _build(final: Path, build: Callable[[Path], dict[str, Any]]) -> Cache:
    _sweep(final)
    if final.exists():
        _log.warning("%s: damaged cache (%s): making it again", final, _look(final))
    temporary = final.with_name(f"{final.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        meta = build(temporary)
        meta["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # a right size must mean right contents, also after a power cut
        if final.exists() and _intact(final) is None:
            _remove(final)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Someone was faster, which only happens without locks; theirs holds the same.
    except OvertakenError:
        _log.info("%s: another process has made this meanwhile", final)
    finally:
        if temporary.exists():
            _remove(temporary)
    found = _intact(final)
    assert found is not None, f"{final} vanished while it was being made"
    return found


def _sweep(final: Path) -> None:
    """Remove what killed processes of this machine left behind of the same folder."""
    for path in final.parent.glob(f"{final.name}.tmp-*"):
        match = _OURS.fullmatch(path.name)
        if match and match["host"] == socket.gethostname() and not Path(f"/proc/{match['pid']}").exists():
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(final: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock that ends with the process. Where the file system has none, go on without: the rename decides.

    Raises BlockingIOError when another process holds it and we are not to wait.
    """
    import fcntl

    with final.with_name(f"{final.name}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            _log.warning("%s: another process is making this; waiting for it", final)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            _log.info("%s: no lock here (%s)", final, error.strerror)
        yield
