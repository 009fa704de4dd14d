"""Every format gives the very text that went in, and every fault names its file and line."""

import bz2
import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from llm.data import DataError, Files, Hub, StandardLibrary
from llm.data.source import Source

# What readers like to spoil: numbers, "NA", quotes, line breaks, separators, other scripts, carriage returns.
TEXTS = ["plain", "1.0", "NA", 'a "quoted", word\nand a line\n', "tab\tand é 日本 😀", " spaces ", "cr\r\nlf"]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(TEXTS))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=2)


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS), "utf-8")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": write_lines,
    "a.ndjson": write_lines,
    "lines.json": write_lines,
    "array.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=2), "utf-8"),
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize(
    ("name", "compression"),
    [(name, end) for name in WRITERS for end in ("", ".gz", ".zst") if not (end and name.endswith(".parquet"))],
)
def test_formats_give_the_text_unchanged(tmp_path: Path, name: str, compression: str) -> None:
    plain = tmp_path / name
    WRITERS[name](plain)
    path = tmp_path / (name + compression)
    if compression == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif compression == ".zst":
        path.write_bytes(zstandard.compress(plain.read_bytes()))
    assert list(Files(str(path)).documents()) == TEXTS


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.csv").write_bytes(mark + b"text\nhello\n")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "hello"}\n')
    (tmp_path / "a.json").write_bytes(mark + b'[{"text": "hello"}]')
    (tmp_path / "a.txt").write_bytes(mark + b"hello")
    assert list(Files(str(tmp_path)).documents()) == ["hello"] * 4


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\r\ntwo\n\n \n\nthree\n"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
    ],
)
def test_plain_text_by_file_paragraph_or_line(tmp_path: Path, document: Any, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n \n\nthree\n")
    assert list(Files(str(tmp_path / "a.txt"), document=document).documents()) == expected


def test_several_frames_of_a_compressed_file_are_all_read(tmp_path: Path) -> None:
    lines = [f"{i}\n".encode() * 100 for i in range(3)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    (tmp_path / "b.txt.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert list(Files(str(tmp_path)).documents()) == [b"".join(lines).decode()] * 2


def test_large_compressed_lines(tmp_path: Path) -> None:
    texts = ["x" * 300_000, "y" * 300_000]
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress("\n".join(texts).encode()))
    assert list(Files(str(tmp_path), document="line").documents()) == texts


def test_a_folder_a_glob_and_a_list(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "README", "model.bin"):
        (tmp_path / name).write_text(name)
    assert list(Files(str(tmp_path)).documents()) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(Files(str(tmp_path / "**" / "*.txt")).documents()) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(Files([str(tmp_path / "sub"), str(tmp_path / "README")]).documents()) == ["sub/c.txt", "README"]


def test_fingerprints_follow_the_files_and_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path)
    before = Files(str(path)).fingerprint()
    assert Files(str(path)).fingerprint() == before
    assert Files(str(path), column="body").fingerprint() != before
    assert Files(str(path), weight=2.0).fingerprint() == before  # the same documents
    path.write_text('{"text": "other"}\n')
    assert Files(str(path)).fingerprint() != before


def test_own_validation_files(tmp_path: Path) -> None:
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text(name)
    source = Files(str(tmp_path / "train.txt"), val_path=str(tmp_path / "val.txt"))
    held_out = source.validation()
    assert held_out is not None
    assert held_out.validation() is None
    assert (list(source.documents()), list(held_out.documents())) == (["train.txt"], ["val.txt"])


def test_the_end_of_each_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789\néèêëà日本語", "utf-8")  # 19 characters, of more bytes
    source = Files(str(tmp_path / "a.txt"), val_share=0.1)
    held_out = source.validation()
    assert held_out is not None
    assert held_out.validation() is None
    assert (list(source.documents()), list(held_out.documents())) == (["0123456789\néèêëà日"], ["本語"])
    by_line = Files(str(tmp_path / "a.txt"), document="line", val_share=0.5)
    ends = by_line.validation()
    assert ends is not None
    assert (list(by_line.documents()), list(ends.documents())) == (["01234", "éèêë"], ["56789", "à日本語"])
    whole = Files(str(tmp_path / "a.txt"))
    assert len({which.fingerprint() for which in (whole, source, held_out, by_line, ends)}) == 5


def test_what_is_held_out_is_said_once_and_is_a_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val_share=0\.1 .* val_path=b says already .* leave one"):
        Files("a", val_path="b", val_share=0.1)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"val_share={share} .* above 0 and below 1"):
            Files("a", val_share=share)


FAULTS = {
    "bad_utf8.jsonl": (
        b'{"text": "a"}\n{"text": "b\xff"}\n',
        r"bad_utf8\.jsonl:2: byte 12 of the line \(0xff\) is not UTF",
    ),
    "bad_utf8.csv": (b"text\nfine\nb\xffd\n", r"bad_utf8\.csv:3: byte 2 of the line \(0xff\) is not UTF-8; convert"),
    "bad_utf8.txt": (b"one\ntwo\nth\xffree", r"bad_utf8\.txt:3: byte 3 of the line \(0xff\) is not UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON \(Expecting value, character 10\)"),
    "bad.json": (b'[{"text": "a"},\n{"text" "b"}]', r"bad\.json:2: not JSON \(Expecting ':' delimiter, character 9\)"),
    "digits.jsonl": (
        b'{"text": "a"}\n{"text": ' + b"1" * 5000 + b"}\n",
        r"digits\.jsonl:2: no JSON that can be read here \(Exceeds the limit",
    ),
    "deep.json": (b"[" * 100_000, r"deep\.json:1: no JSON that can be read here \(maximum recursion depth"),
    "list.jsonl": (b'["a"]\n', r'list\.jsonl:1: holds list, not an object such as \{"text": "…"\}'),
    "column.jsonl": (
        b'{"id": 1, "body": "a"}\n',
        r"column\.jsonl:1: no column 'text'; it has 'id', 'body': set data\.column \(or the source's column\)",
    ),
    "column.csv": (b"id,body\n1,a\n", r"column\.csv:2: no column 'text'; it has 'id', 'body'"),
    "number.jsonl": (b'{"text": 7}\n', r"number\.jsonl:1: column 'text' holds int, not text; name another column"),
    "half.jsonl": (
        b'{"text": "a\\ud800"}\n',
        r"half\.jsonl:1: column 'text', character 1: half of a surrogate pair \(\\ud800",
    ),
    "fields.csv": (b"text\nb,c\n", r"fields\.csv:2: more fields than the header names; quote the text"),
    "quote.csv": (b'text\n"b"c\n', r"quote\.csv:2: not in the form of \.csv \("),
    "empty.jsonl": (b"", r"empty\.jsonl: the file is empty; remove it from data\.path or fill it"),
    "cut.txt.gz": (
        gzip.compress(b"hello" * 99)[:-9],
        r"cut\.txt\.gz: damaged or cut off \(.*\); compress or copy it again",
    ),
    "not.txt.gz": (bz2.compress(b"hello"), r"not\.txt\.gz: damaged or cut off"),
    "cut.txt.zst": (
        zstandard.compress(b"hello" * 99)[:-3],
        r"cut\.txt\.zst: damaged or cut off \(it ends in the middle",
    ),
    "not.txt.zst": (bz2.compress(b"hello"), r"not\.txt\.zst: damaged or cut off"),
    "bad.parquet": (b"PAR1 or not", r"bad\.parquet: not a parquet file that can be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_line_and_remedy(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(Files(str(tmp_path / name)).documents())
    assert "\n" not in str(error.value)


def test_a_wrong_parquet_column_names_those_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; it has 'id', 'text': set data\.column"):
        list(Files(str(tmp_path / "a.parquet"), column="body").documents())
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: column 'id' holds int, not text"):
        list(Files(str(tmp_path / "a.parquet"), column="id").documents())


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "b"}\n')
    assert list(Files(str(tmp_path / "a.jsonl")).documents()) == ["", "b"]


def test_a_document_too_large_to_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.data.read._LARGEST_DOCUMENT", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(DataError, match=r"a\.txt: more than 0 MiB in one document; set the source's document to par"):
        list(Files(str(tmp_path / "a.txt")).documents())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", r"nowhere\.txt: no such file or folder \(looked from /"),
        ("*.nothing", r"\*\.nothing: no file fits this pattern"),
    ],
)
def test_missing_files(path: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Files(path).documents())


@pytest.mark.parametrize("path", ["", [], [""], ["a.txt", ""]])
def test_an_empty_path_is_not_the_current_folder(path: str | list[str]) -> None:
    for given in ({"path": path}, {"path": "a.txt", "val_path": path}):
        with pytest.raises(ValueError, match=r"path=.* of a data source: is empty; name a file, a folder or a glob"):
            Files(**given)  # type: ignore[arg-type]


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(DataError, match=r"no file below it ends in \.jsonl, \.json, \.csv, \.tsv, \.parquet or \.txt"):
        Files(str(tmp_path)).files()


@pytest.mark.parametrize("source", [StandardLibrary, lambda weight: Files("a", weight=weight)])
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_are_positive(source: Callable[..., Source], weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight=.* of a data source or task: must be more than 0; leave it out"):
        source(weight=weight)


class TestStandardLibrary:
    def test_holds_the_sources_without_their_tests(self) -> None:
        files = [path.as_posix() for path in StandardLibrary().files()]
        assert files == sorted(files, key=lambda name: Path(name).parts)
        assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(files)
        assert not [name for name in files if {"test", "tests", "site-packages"} & set(Path(name).parts)]
        assert StandardLibrary().fingerprint() == StandardLibrary().fingerprint()

    def test_missing_sources_are_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(DataError, match=r"no \*\.py files here; give files with data=files data\.path=…"):
            list(StandardLibrary().documents())


class TestHub:
    """`datasets` reads a local folder as it reads the hub."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for split in ("train", "test"):
            rows = [{"text": f"{split} {i}", "n": i} for i in range(5)]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    def test_streams_a_split(self, folder: Path) -> None:
        source = Hub(str(folder), val_split="test", n_documents=3)
        held_out = source.validation()
        assert held_out is not None
        assert list(source.documents()) == ["train 0", "train 1", "train 2"]
        assert list(held_out.documents()) == ["test 0", "test 1", "test 2"]
        assert source.fingerprint() != held_out.fingerprint()
        assert Hub(str(folder)).validation() is None

    def test_errors_name_the_data_set(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"\[train\]\[0\]: no column 'body'; it has 'text', 'n': set data\.column"):
            list(Hub(str(folder), column="body").documents())
        with pytest.raises(DataError, match=r"hub data set '.*' \(config None, split nope\): .*nope"):
            list(Hub(str(folder), split="nope").documents())


def test_importing_sources_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'lightning', 'datasets', 'pyarrow', 'tokenizers'}"
    code = f"import sys, llm.data.source; print(sorted({heavy} & set(sys.modules)))"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
