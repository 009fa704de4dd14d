"""Reading local files row by row, in bounded memory, with errors that name file and line.

`datasets` is not used for these: its builders guess types (a csv text "1.0" comes back as a number, "NA" as nothing)
and its errors name neither file nor line.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

from llm.data.source import DataError, Row, decode, text_of

_BOM = b"\xef\xbb\xbf"
# In bytes. A document is held in memory whole, more than once while it is read.
_LARGEST_DOCUMENT = 1 << 28


def read(path: Path, column: str, document: str) -> Iterator[str]:
    """Documents of one file; the ending says how to read it. Raises DataError."""
    if _kind(path) in (*_ROWS, ".parquet"):
        for row, where in rows(path, document, column):
            yield text_of(row, column, where)
    else:
        for row, _ in rows(path, document):
            yield row["text"]


def rows(path: Path, document: str, column: str | None = None) -> Iterator[tuple[Row, str]]:
    """Rows of one file, and where each is: all columns, of parquet only `column` if one is given; plain text has
    documents in a column `text`. Raises DataError."""
    kind = _kind(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; remove it from data.path or fill it")
    if kind == ".parquet":
        yield from _parquet(path, column)
        return
    with _open(path) as stream:
        if kind in _ROWS:
            yield from _ROWS[kind](path, stream)
        else:
            for number, text in enumerate(_TEXT[document](path, stream), 1):
                yield {"text": text}, f"{path}: {document} {number}"


def lines(path: Path) -> Iterator[str]:
    """Every line of a text file, empty ones too. Raises DataError."""
    with _open(path) as stream:
        for _, line in _lines(path, stream):
            yield line


def is_known(path: Path) -> bool:
    """Whether the ending says what is in the file."""
    return _kind(path) in {*_ROWS, ".parquet", ".txt"}


def _kind(path: Path) -> str:
    endings = path.suffixes
    while endings and endings[-1] in (".gz", ".zst"):
        endings = endings[:-1]
    return endings[-1].lower() if endings else ""


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """The bytes of a file, decompressed. Damage shows only while reading, so it is turned into DataError out here."""
    if path.suffix not in (".gz", ".zst"):
        with path.open("rb") as stream:
            yield stream
        return
    unpacked: Any = gzip.GzipFile(path) if path.suffix == ".gz" else _Zstandard(path)
    with BufferedReader(unpacked) as stream:
        try:
            yield stream
        except (gzip.BadGzipFile, EOFError, ZlibError) as error:
            raise DataError(f"{path}: damaged or cut off ({error}); compress or copy it again") from None


class _Zstandard(RawIOBase):
    """The decompressed bytes of a .zst file, all its frames; EOFError where it is cut off or damaged.

    zstandard's own reader ends without a word in the middle of a frame, and after the first frame.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame is not None and self._frame.eof:
                compressed, self._frame = self._frame.unused_data, None
            else:
                compressed = b""
            compressed = compressed or self._file.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = self._frame.decompress(compressed)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(path: Path, stream: BufferedReader) -> Iterator[tuple[int, str]]:
    """(line number, line without its end)"""
    for number, raw in enumerate(iter(lambda: stream.readline(_LARGEST_DOCUMENT + 1), b""), 1):
        if len(raw) > _LARGEST_DOCUMENT:
            raise DataError(f"{path}:{number}: more than {_LARGEST_DOCUMENT >> 20} MiB in one line; split it")
        if number == 1:
            raw = raw.removeprefix(_BOM)
        yield number, decode(path, raw.rstrip(b"\r\n"), number)


def _json_lines(path: Path, stream: BufferedReader) -> Iterator[tuple[Row, str]]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        yield _object(_parsed(line, path, number), f"{path}:{number}"), f"{path}:{number}"


def _json(path: Path, stream: BufferedReader) -> Iterator[tuple[Row, str]]:
    """A .json file holds one array of objects (read whole), or lines of objects after all."""
    if not stream.peek(1 << 10).removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _json_lines(path, stream)
        return
    whole = decode(path, _at_most(path, stream, "write one object a line (`jq -c '.[]'`)"))
    for number, row in enumerate(_parsed(whole, path)):
        yield _object(row, f"{path}[{number}]"), f"{path}[{number}]"


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """What JSON that begins in this line stands for. Raises DataError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{where}: not JSON ({error.msg}, character {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets in another
        raise DataError(f"{path}:{line}: no JSON that can be read here ({error})") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f'{where}: holds {type(row).__name__}, not an object such as {{"text": "…"}}')
    return row


def _separated(delimiter: str) -> Callable[[Path, BufferedReader], Iterator[tuple[Row, str]]]:
    def rows(path: Path, stream: BufferedReader) -> Iterator[tuple[Row, str]]:
        number = 0  # csv's own count stands still at a faulty line

        def lines() -> Iterator[str]:
            """With their ends: a quoted field may span several lines, and keeps its line breaks."""
            nonlocal number
            for number, raw in enumerate(stream, 1):
                yield decode(path, raw.removeprefix(_BOM) if number == 1 else raw, number)

        csv.field_size_limit(_LARGEST_DOCUMENT)  # a document is often longer than the 128 kB that csv allows
        try:
            for row in csv.DictReader(lines(), delimiter=delimiter, strict=True):
                if None in row:
                    raise DataError(f"{path}:{number}: more fields than the header names; quote the text")
                yield row, f"{path}:{number}"
        except csv.Error as error:
            raise DataError(f"{path}:{number}: not in the form of {_kind(path)} ({error})") from None

    return rows


def _parquet(path: Path, column: str | None) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column is not None and column not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
            for row in batch.to_pylist():
                yield row, f"{path}[{number}]"
                number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a parquet file that can be read ({str(error).splitlines()[0]})") from None


def _whole(path: Path, stream: BufferedReader) -> Iterator[str]:
    yield decode(path, _at_most(path, stream, "set the source's document to paragraph or line, or split the file"))


def _at_most(path: Path, stream: BufferedReader, remedy: str) -> bytes:
    """The rest of a file. Raises DataError if it is larger than a document may be."""
    raw = stream.read(_LARGEST_DOCUMENT + 1)
    if len(raw) > _LARGEST_DOCUMENT:
        raise DataError(f"{path}: more than {_LARGEST_DOCUMENT >> 20} MiB in one document; {remedy}")
    return raw.removeprefix(_BOM)


def _paragraphs(path: Path, stream: BufferedReader) -> Iterator[str]:
    """Text between blank lines, its own line breaks kept."""
    kept: list[str] = []
    for _, line in _lines(path, stream):
        if line.strip():
            kept.append(line)
        elif kept:
            yield "\n".join(kept)
            kept = []
    if kept:
        yield "\n".join(kept)


def _each_line(path: Path, stream: BufferedReader) -> Iterator[str]:
    return (line for _, line in _lines(path, stream) if line.strip())


Reader = Callable[[Path, BufferedReader], Iterable[tuple[Row, str]]]
_ROWS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}
_TEXT: dict[str, Callable[[Path, BufferedReader], Iterator[str]]] = {
    "file": _whole,
    "paragraph": _paragraphs,
    "line": _each_line,
}
