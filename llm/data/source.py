"""Where documents come from. A source is a config node: cheap to make, read one document at a time, fingerprinted."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt


class DataError(ValueError):
    """The data is not what the config says: one line with the file or key, the rule and the remedy (exit code 65)."""

    exit_code = 65


Row = dict[str, Any]  # column -> value


class Source(ABC):
    """Documents in a fixed order, plus `weight`: the share of this source in a mixture, counted in tokens.

    The shares of several sources are their weights divided by the sum of weights; alone, a weight means nothing.
    """

    weight: float

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Every document, in the same order each time, in bounded memory. Raises DataError. May yield empty ones."""

    def rows(self) -> Iterator[tuple[Row, str]]:
        """Every row with all its columns, in the same order each time, and where it is: for tasks that take more of it
        than one text. Raises DataError."""
        for number, text in enumerate(self.documents(), 1):
            yield {"text": text}, f"document {number}"

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents do, as far as can be told without reading them."""

    def validation(self) -> Source | None:
        """The source of held-out documents, where it has its own; else every `val_every`-th document is held out."""
        return None


# Installed packages, and tests, which repeat themselves and hold files that are no Python on purpose.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class StandardLibrary(Source):
    """The sources of the running Python's standard library without its tests: about 12 MB that every machine has."""

    weight: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def files(self) -> list[Path]:
        """Paths below the library's folder, sorted."""
        root = self._root()
        found: list[Path] = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
            below = Path(folder).relative_to(root)
            found += [below / name for name in names if name.endswith(".py")]
        return sorted(found)

    def documents(self) -> Iterator[str]:
        root, files = self._root(), self.files()
        if not files:
            raise DataError(f"{root}: no *.py files here; give files with data=files data.path=…")
        for file in files:
            yield decode(root / file, (root / file).read_bytes())

    def fingerprint(self) -> str:
        # Not the modification times: they differ between machines that hold the same Python.
        root = self._root()
        sizes = [(path.as_posix(), (root / path).stat().st_size) for path in self.files()]
        return digest("stdlib", platform.python_version(), sizes)

    def _root(self) -> Path:
        return Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class Files(Source):
    """Local files: .jsonl .json .csv .tsv .parquet, else plain text; all but parquet also as .gz or .zst.

    `path` is a file, a folder (all files below it with a known ending), a glob, or a list of these. `column` names
    the field that holds the text. A plain text file is one `document`, or one per paragraph (between blank lines) or
    per line. `val_path` names held-out files; `val_share` instead holds out the end of each document, for texts that
    are few and long: so much of its characters. With neither, every `val_every`-th document is held out.
    """

    path: str | list[str]
    column: str = "text"
    document: Literal["file", "paragraph", "line"] = "file"
    val_path: str | list[str] | None = None
    val_share: Annotated[float, Gt(0), Lt(1)] | None = None
    weight: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        for key, paths in (("path", self.path), ("val_path", self.val_path)):
            # An empty path is the current folder: whatever lies below it would be read.
            if paths is not None and not (paths and all(paths)):
                raise ValueError(
                    f"{key}={paths!r} of a data source: is empty; name a file, a folder or a glob, or a list of these"
                )
        if self.val_share is None:
            return
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share={self.val_share} of a data source: must be above 0 and below 1, as 0.1")
        if self.val_path is not None:
            raise ValueError(
                f"val_share={self.val_share} of a data source: val_path={self.val_path} says already what is held "
                "out; leave one of the two out"
            )

    def files(self) -> list[Path]:
        paths: Iterable[str] = [self.path] if isinstance(self.path, str) else self.path
        return [file for path in paths for file in _expand(path)]

    def documents(self) -> Iterator[str]:
        from llm.data.read import read

        for file in self.files():
            for text in read(file, self.column, self.document):
                yield text[: self.first_held_out(text)]

    def rows(self) -> Iterator[tuple[Row, str]]:
        from llm.data.read import rows

        if self.val_share is not None:
            raise DataError(
                f"val_share={self.val_share} of a data source: holds out the ends of documents, and rows have none; "
                "name a val_path, or set data.val_every"
            )
        for file in self.files():
            yield from rows(file, self.document)

    def first_held_out(self, text: str) -> int | None:
        """The first character of a document that is held out; None: all of it is trained on."""
        return None if self.val_share is None else int(len(text) * (1 - self.val_share))

    def fingerprint(self) -> str:
        files = [(path.resolve().as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]
        share = [] if self.val_share is None else [self.val_share]
        return digest("files", files, self.column, self.document, *share)

    def validation(self) -> Source | None:
        if self.val_share is not None:
            return _Ends(self)
        return None if self.val_path is None else replace(self, path=self.val_path, val_path=None)


@dataclass(frozen=True)
class _Ends(Source):
    """The ends of documents that `val_share` of their source holds out."""

    source: Files

    @property
    def weight(self) -> float:  # type: ignore[override]
        return self.source.weight

    def documents(self) -> Iterator[str]:
        for text in replace(self.source, val_share=None).documents():
            yield text[self.source.first_held_out(text) :]

    def fingerprint(self) -> str:
        return digest("ends", self.source.fingerprint())


@dataclass(frozen=True)
class Lines(Source):
    """Text files of which line n belongs to line n of the others, as parallel corpora are kept: `paths` names a file,
    also .gz or .zst, for each column. `val_paths` names held-out files; without them every `val_every`-th row is.

    As text for pretraining, or for a tokenizer, every line of every column is a document.
    """

    paths: Mapping[str, str]
    val_paths: Mapping[str, str] | None = None
    weight: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def documents(self) -> Iterator[str]:
        for row, _ in self.rows():
            yield from row.values()

    def rows(self) -> Iterator[tuple[Row, str]]:
        from llm.data.read import lines

        files = [_file(path) for path in self.paths.values()]
        for number, texts in enumerate(zip_longest(*(lines(file) for file in files)), 1):
            if None in texts:
                ended, longer = (
                    files[texts.index(None)],
                    next(f for f, text in zip(files, texts, strict=True) if text is not None),
                )
                raise DataError(
                    f"{longer}:{number}: {ended} ends before this line; files of Lines have as many lines each"
                )
            yield dict(zip(self.paths, texts, strict=True)), f"{files[0]}:{number}"

    def fingerprint(self) -> str:
        stats = [
            (name, file.resolve().as_posix(), file.stat())
            for name, path in self.paths.items()
            for file in [_file(path)]
        ]
        return digest("lines", [(name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in stats])

    def validation(self) -> Source | None:
        return None if self.val_paths is None else replace(self, paths=self.val_paths, val_paths=None)


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the Hugging Face hub (or a folder that `datasets.load_dataset` reads), streamed in bounded memory.

    `revision` pins a commit: without it the cache does not notice when the data set changes. `n_documents` stops
    after so many. `val_split` names held-out documents; without it every `val_every`-th document is held out.
    """

    name: str
    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    column: str = "text"
    revision: str | None = None
    n_documents: int | None = None
    weight: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def documents(self) -> Iterator[str]:
        for row, where in self.rows():
            yield text_of(row, self.column, where)

    def rows(self) -> Iterator[tuple[Row, str]]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for number, row in enumerate(islice(rows, self.n_documents)):
                yield row, f"{self.name}[{self.split}][{number}]"
        except DataError:
            raise
        except Exception as error:  # datasets raises its own, pyarrow's, requests' and fsspec's
            reason = str(error).strip().split("\n")[0]
            where = f"hub data set {self.name!r} (config {self.config}, split {self.split})"
            raise DataError(f"{where}: {type(error).__name__}: {reason}") from error

    def fingerprint(self) -> str:
        local = (
            sorted(path for path in Path(self.name).rglob("*") if path.is_file()) if Path(self.name).is_dir() else []
        )
        files = [(path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in local]
        return digest("hub", self.name, self.config, self.split, self.column, self.revision, self.n_documents, files)

    def validation(self) -> Source | None:
        return None if self.val_split is None else replace(self, split=self.val_split, val_split=None)


def digest(*parts: Any) -> str:
    """A short name for a tuple of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def decode(path: Path, raw: bytes, first_line: int = 1) -> str:
    """Bytes of `path` as text, unchanged. Raises DataError with the line of the first byte that is no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte {column} of the line (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, e.g. `iconv -f latin1 -t utf8`"
        ) from None


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in `column` of a row; null is an empty document. Raises DataError: no such column, or no text in it."""
    if column not in row:
        names = ", ".join(map(repr, row))
        raise DataError(f"{where}: no column {column!r}; it has {names}: set data.column (or the source's column)")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, not text; name another column")
    at = half_pair(text)
    if at is not None:
        raise DataError(
            f"{where}: column {column!r}, character {at}: half of a surrogate pair "
            f"(\\u{ord(text[at]):04x}) is no character; repair the escape in the file"
        )
    return text


def half_pair(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which no tokenizer takes; None: nowhere."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _file(path: str) -> Path:
    """One file that is there."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise DataError(f"{path}: no such file (looked from {Path.cwd()})")
    return found


def _expand(path: str) -> list[Path]:
    from llm.data.read import is_known

    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(file for file in root.rglob("*") if file.is_file() and is_known(file))
        rule = "no file below it ends in .jsonl, .json, .csv, .tsv, .parquet or .txt (or these with .gz or .zst)"
    else:
        # Path.glob wants a pattern below a folder that exists: everything before the first wildcard.
        fixed = next((i for i, part in enumerate(root.parts) if set(part) & set("*?[")), None)
        if fixed is None:
            raise DataError(f"{path}: no such file or folder (looked from {Path.cwd()})")
        folder = Path(*root.parts[:fixed])
        found = sorted(file for file in folder.glob(str(Path(*root.parts[fixed:]))) if file.is_file())
        rule = "no file fits this pattern"
    if not found:
        raise DataError(f"{path}: {rule}")
    return found


def check_weight(weight: float) -> None:
    """Raise ValueError unless a share of a mixture is more than nothing."""
    if not weight > 0:
        raise ValueError(f"weight={weight} of a data source or task: must be more than 0; leave it out instead")
