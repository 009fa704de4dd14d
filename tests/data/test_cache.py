"""A cache is there in whole or not at all, whoever is killed, and is looked at before it is believed."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm.data.cache import cached, caches, remove_caches

KEY = "0123456789abcdef"


class Builder:
    """Writes one file, and counts how often."""

    def __init__(self, content: bytes = b"content") -> None:
        self.content = content
        self.n_calls = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.n_calls += 1
        (folder / "a.bin").write_bytes(self.content)
        return {"answer": 42}


def test_built_once_and_found_again(tmp_path: Path) -> None:
    build = Builder()
    first = cached(tmp_path / "new", "tokens", KEY, build)
    again = cached(tmp_path / "new", "tokens", KEY, build)
    assert build.n_calls == 1
    assert first == again
    assert (again.meta["answer"], again.kind, again.n_bytes) == (42, "tokens", 7)
    assert (again.path / "a.bin").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b"cont"), r"a\.bin is not 7 bytes long\): making it again"),
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), r"Expecting property name"),
        (lambda folder: (folder / "meta.json").unlink(), r"meta\.json is missing"),
        (lambda folder: (folder / "meta.json").write_text("[]"), r"list indices"),
    ],
)
def test_a_damaged_cache_is_made_again_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, message: str
) -> None:
    build = Builder()
    damage(cached(tmp_path, "tokens", KEY, build).path)
    with caplog.at_level(logging.WARNING):
        found = cached(tmp_path, "tokens", KEY, build)
    assert build.n_calls == 2
    assert (found.path / "a.bin").read_bytes() == b"content"
    (record,) = caplog.records
    assert re.search(rf"tokens-{KEY}: damaged cache \(.*{message}", record.getMessage())


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached(tmp_path, "tokens", KEY, fail)
    assert caches(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [f"tokens-{KEY}.lock"]


CHILD = """
import sys, time
from pathlib import Path
from llm.data.cache import cached
root, delay = Path(sys.argv[1]), float(sys.argv[2])
def build(folder):
    (folder / "a.bin").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(delay)
    (folder / "a.bin").write_bytes(b"whole")
    return {}
print(cached(root, "tokens", "0123456789abcdef", build).path, flush=True)
"""


def start(root: Path, delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(root), str(delay)]
    repository = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_is_taken_for_a_cache(tmp_path: Path) -> None:
    child = start(tmp_path, 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    left = [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert len(left) == 1
    assert caches(tmp_path) == []
    build = Builder()
    assert (cached(tmp_path, "tokens", KEY, build).path / "a.bin").read_bytes() == b"content"
    assert build.n_calls == 1
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name], "and what it left is swept up"


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    children = [start(tmp_path, 0.5) for _ in range(3)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sum("building" in output for output in outputs) == 1
    assert {output.splitlines()[-1] for output in outputs} == {str(tmp_path / f"tokens-{KEY}")}
    assert (tmp_path / f"tokens-{KEY}" / "a.bin").read_bytes() == b"whole"


def test_without_locks_the_first_rename_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_lock)
    other = Builder(b"first")

    def slow(folder: Path) -> dict[str, Any]:
        cached(tmp_path, "tokens", KEY, other)
        return Builder(b"second")(folder)

    assert (cached(tmp_path, "tokens", KEY, slow).path / "a.bin").read_bytes() == b"first"
    assert other.n_calls == 1


def test_list_and_remove(tmp_path: Path) -> None:
    for kind in ("tokens", "rows"):
        cached(tmp_path, kind, KEY, Builder())
    (tmp_path / f"tokens-{KEY}.tmp-elsewhere-1-00000000").mkdir()
    (tmp_path / f"tokens-{KEY}.tmp-elsewhere-1-00000000" / "a.bin").write_bytes(b"left")
    for name in ("my-thesis.txt", "tokens-of-mine"):
        (tmp_path / name).write_text("precious")
    assert [cache.kind for cache in caches(tmp_path)] == ["rows", "tokens"]
    meta = (tmp_path / f"tokens-{KEY}" / "meta.json").stat().st_size
    assert remove_caches(tmp_path) == 2 * (7 + meta) + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-thesis.txt", "tokens-of-mine"]
    assert remove_caches(tmp_path) == 0
    assert caches(tmp_path / "nowhere") == []


def test_what_is_being_made_is_not_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = start(tmp_path, 1.0)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    assert remove_caches(tmp_path) == 0
    assert "another process is at work on this; it stays" in caplog.text
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_a_place_that_cannot_be_written_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data\.cache_dir=.*/file/sub: Not a directory; free some space or set another"):
        cached(tmp_path / "file" / "sub", "tokens", KEY, Builder())


def test_a_full_disk_names_the_key_and_keeps_the_error_number(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"data\.cache_dir=.*: No space left on device; free some space") as error:
        cached(tmp_path, "tokens", KEY, full)
    assert error.value.errno == errno.ENOSPC


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def read(folder: Path) -> dict[str, Any]:
        (tmp_path / "source.txt").read_text()
        return {}

    with pytest.raises(FileNotFoundError, match=r"source\.txt"):
        cached(tmp_path / "cache", "tokens", KEY, read)


def test_waiting_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = start(tmp_path, 0.5)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    started = time.monotonic()
    build = Builder()
    cached(tmp_path, "tokens", KEY, build)
    assert build.n_calls == 0
    assert time.monotonic() - started > 0.2
    assert "another process is making this; waiting for it" in caplog.text
    child.communicate()


def test_meta_lists_the_files(tmp_path: Path) -> None:
    path = cached(tmp_path, "tokens", KEY, Builder()).path
    assert json.loads((path / "meta.json").read_text()) == {"answer": 42, "files": {"a.bin": 7}}
