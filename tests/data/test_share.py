"""The tasks of an array make, together, the files that one process makes, byte for byte, or none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import DataError, Files, TextData, TextToText, encode, parts, share
from llm.data import prepare as preparing
from llm.data.cache import Cache, caches, find, remove_caches
from llm.data.prepare import prepare_tokens
from llm.data.share import Share, are_there, merged, prepare_share
from llm.data.source import Source
from llm.data.task import Masking
from llm.data.tokens import Text
from llm.tokenizer import ByteLevelBPE, Bytes, Tokenizer, WordPiece
from tests.data.conftest import make_texts, write_jsonl
from tests.data.test_prepare import Counted

SPARSE = ["", *make_texts(20), "", "", *make_texts(9, seed=1), *[""] * 7, *make_texts(4, seed=2), ""]
LONG = [" ".join(make_texts(60)), *make_texts(5), "x" * 300, "", "\n \t1".join(make_texts(20))]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, chunks, parts of documents and copies of which these texts have several."""
    monkeypatch.setattr(share, "_BLOCK", 3)
    monkeypatch.setattr(share, "_AT_ONCE", 50)
    monkeypatch.setattr(encode, "_CHUNK_PARTS", 7)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(encode, "_LONGEST_PART", 400)


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, text that is tokenised all the same is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("this should have been put together of shares")

    return lambda: monkeypatch.setattr(preparing, "tokenised", refuse)


def text_of(source: Source, tokenizer: Tokenizer | None = None, words: bool = False) -> Text:
    return Text("mine", source, tokenizer or Bytes().build(), words)


def divide(text: Text, of: int, root: Path) -> list[bool]:
    """Make all shares, one after the other; returns whether all were there after each."""
    there = []
    for number in range(of):
        prepare_share(text, Share(number, of), root)
        there.append(are_there(text, of, root))
    return there


def put_together(text: Text, root: Path) -> Cache:
    return prepare_tokens(text.name, text.source, text.tokenizer, root, text.words)


def contents(cache: Cache) -> dict[str, Any]:
    """All that is in a cache but how long it took."""
    files = {name: (cache.path / name).read_bytes() for name in cache.meta["files"]}
    return {"name": cache.path.name, **{name: cache.meta[name] for name in cache.meta if name != "seconds"}} | files


def kinds(root: Path) -> set[str]:
    """What lies in a folder, locks and left-overs too."""
    return {path.name.split("-")[0] for path in root.iterdir()}


class Quiet(Counted):
    """A source that does not notice when it changes."""

    def fingerprint(self) -> str:
        return "the same"


class TestBytes:
    """What comes of an array, against one process."""

    @pytest.mark.parametrize("of", [1, 4, 7, 40])
    @pytest.mark.parametrize("texts", [SPARSE, LONG, make_texts(2)], ids=["sparse", "long", "few"])
    @pytest.mark.parametrize("recipe", [ByteLevelBPE(300), WordPiece(300), Bytes()], ids=repr)
    def test_an_array_makes_what_one_process_makes(
        self, recipe: Any, texts: list[str], of: int, tmp_path: Path, no_tokenising: Callable[[], None]
    ) -> None:
        tokenizer = recipe.build(make_texts(50))
        text = text_of(Counted(texts), tokenizer, tokenizer.has_words)
        one = put_together(text, tmp_path / "one")
        assert divide(text, of, tmp_path / "array") == [False] * (of - 1) + [True]
        no_tokenising()
        several = put_together(text, tmp_path / "array")
        assert contents(several) == contents(one)
        assert several.meta["empty"] == texts.count("")
        assert several.meta["files"]["words.bin"] == (several.meta["files"]["tokens.bin"] // 2 if text.words else 0)
        assert kinds(tmp_path / "array") == {"tokens"}

    @settings(max_examples=60)
    @given(st.lists(st.sampled_from(["", "a", "two words", "é" * 70]), min_size=1, max_size=30), st.integers(1, 12))
    def test_whatever_there_is_and_however_divided(self, texts: list[str], of: int) -> None:
        text = text_of(Counted([*texts, "one at least"]))
        with tempfile.TemporaryDirectory() as folder:
            one, root = Path(folder, "one"), Path(folder, "array")
            divide(text, of, root)
            assert sum(cache.meta["documents"] for cache in caches(root)) == len(texts) - texts.count("") + 1
            assert contents(put_together(text, root)) == contents(put_together(text, one))

    def test_blocks_as_they_are_meant_to_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tokenising: Callable[[], None]
    ) -> None:
        monkeypatch.undo()
        text = text_of(Counted([str(number) if number % 5 else "" for number in range(3000)]))
        one = put_together(text, tmp_path / "one")
        divide(text, 2, tmp_path / "array")
        documents = [cache.meta["documents"] + cache.meta["empty"] for cache in caches(tmp_path / "array")]
        assert documents == [1024 + 952, 1024]
        no_tokenising()
        assert contents(put_together(text, tmp_path / "array")) == contents(one)


class TestData:
    """The same of all that a run reads."""

    def make(self, folder: Path, cache: str, **arguments: Any) -> TextData:
        if not (folder / "val.jsonl").exists():  # a file that is written again is another one
            write_jsonl(folder / "a.jsonl", SPARSE)
            write_jsonl(folder / "b.jsonl", make_texts(30))
            write_jsonl(folder / "val.jsonl", make_texts(8, seed=1))
        a, b, val = (str(folder / f"{name}.jsonl") for name in ("a", "b", "val"))
        sources = {"a": Files(a, weight=3.0), "b": Files(b, val_path=val)}
        settings = {"sources": sources, "max_length": 64, "cache_dir": str(folder / cache), "val_every": 10}
        return TextData(arguments.pop("recipe", Bytes()), **(settings | arguments))

    @pytest.mark.parametrize("words", [False, True])
    def test_sources_and_their_own_validation(
        self, tmp_path: Path, words: bool, no_tokenising: Callable[[], None]
    ) -> None:
        chosen: dict[str, Any] = {"recipe": WordPiece(300), "tasks": {"hide": Masking(whole_word=words)}}
        one = self.make(tmp_path, "one", **chosen)
        one.prepare()
        tasks = [self.make(tmp_path, "array", **chosen) for _ in range(4)]
        there = [task.prepare_share(number, 4) for task, number in zip(tasks, (2, 0, 3, 1), strict=True)]
        assert there == [False, False, False, True]
        n_files = 3  # of tokens: a, b, and what b is validated on
        assert len([cache for cache in caches(tmp_path / "array") if cache.kind == "share"]) == 4 * n_files
        no_tokenising()
        data = self.make(tmp_path, "array", **chosen)
        data.prepare()
        mine, theirs = caches(tmp_path / "one"), caches(tmp_path / "array")
        assert list(map(contents, theirs)) == list(map(contents, mine))
        assert [cache.meta["words"] for cache in mine if cache.kind == "tokens"] == [words] * n_files
        assert data.fingerprint == one.fingerprint
        assert data.report() | {"cache_dir": ""} == one.report() | {"cache_dir": ""}

    def test_the_last_task_sees_all_whichever_was_faster_with_which_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (self.make(tmp_path, "array") for _ in range(2))
        made: list[str] = []
        told: list[bool] = []

        def overtaken(text: Text, share: Share, root: Path) -> None:
            if made and not told:  # after this one's first, the other makes all of its own
                monkeypatch.setattr(parts, "prepare_share", prepare_share)
                told.append(second.prepare_share(1, 2))
            prepare_share(text, share, root)
            made.append(text.name)

        monkeypatch.setattr(parts, "prepare_share", overtaken)
        assert first.prepare_share(0, 2)
        assert told == [False]

    def test_examples_are_not_divided(self, tmp_path: Path) -> None:
        task = TextToText(source="{id}", target="{text}")
        data = self.make(tmp_path, "array", tasks={"copy": task}, target_length=500, max_length=500)
        assert data.prepare_share(1, 4), "there is nothing to wait for"
        assert caches(tmp_path / "array") == []

    @pytest.mark.parametrize(("number", "of"), [(4, 4), (-1, 4), (0, 0), (0, -1)])
    def test_shares_that_there_cannot_be(self, tmp_path: Path, number: int, of: int) -> None:
        with pytest.raises(ValueError, match=rf"share {number}/{of}: the first number counts from 0 and must be below"):
            self.make(tmp_path, "array").prepare_share(number, of)
        assert not (tmp_path / "array").exists()


class TestOnce:
    """A share is made once, by whoever is told to, and goes when it has served."""

    def test_a_repeated_task_finds_its_share(self, tmp_path: Path) -> None:
        source = Counted(SPARSE)
        text = text_of(source)
        for _ in range(2):
            prepare_share(text, Share(1, 4), tmp_path)
            assert source.n_reads == 1
        divide(text, 4, tmp_path)
        assert source.n_reads == 4
        put_together(text, tmp_path)
        assert source.n_reads == 4
        assert divide(text, 4, tmp_path) == [True] * 4, "of what stands no share is made"
        assert (source.n_reads, kinds(tmp_path)) == (4, {"tokens"})

    def test_shares_are_caches(self, tmp_path: Path) -> None:
        text = text_of(Counted(SPARSE))
        prepare_share(text, Share(2, 11), tmp_path)
        prepare_share(text, Share(2, 110), tmp_path)
        found = caches(tmp_path)
        assert [cache.path.name for cache in found] == [f"share-{text.key}-2of11", f"share-{text.key}-2of110"]
        assert {cache.kind for cache in found} == {"share"}
        assert {*found[0].meta["files"]} == {"tokens.bin", "documents.bin", "words.bin", "blocks.bin"}
        meta = sum((cache.path / "meta.json").stat().st_size for cache in found)
        assert remove_caches(tmp_path) == sum(cache.n_bytes for cache in found) + meta
        assert list(tmp_path.iterdir()) == []

    def test_shares_of_another_text_stay(self, tmp_path: Path) -> None:
        other = text_of(Counted(LONG))
        divide(other, 2, tmp_path)
        text = text_of(Counted(SPARSE))
        divide(text, 3, tmp_path)
        put_together(text, tmp_path)
        assert are_there(other, 2, tmp_path)
        assert len(caches(tmp_path)) == 3

    def test_shares_that_nobody_may_delete_stop_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = text_of(Counted(SPARSE))
        divide(text, 2, tmp_path)

        def refuse(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(share, "remove_caches", refuse)
        assert put_together(text, tmp_path).kind == "tokens"
        assert "mine: its shares stay, as they cannot be removed" in caplog.text

    def test_a_source_without_documents(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data source 'mine' has no documents \(only 5 empty ones\)"):
            prepare_share(text_of(Counted([""] * 5)), Share(1, 4), tmp_path)
        assert caches(tmp_path) == []


class TestMissing:
    """What does not make up the text is not taken for it."""

    def whole(self, text: Text, root: Path) -> dict[str, Any]:
        return contents(put_together(text, root / "one"))

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda folder: remove_caches(folder.parent, folder.name),
            lambda folder: (folder / "tokens.bin").write_bytes(b"cut"),
            lambda folder: (folder / "meta.json").unlink(),
        ],
        ids=["missing", "cut off", "without meta"],
    )
    def test_a_share_that_is_not_there(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any]
    ) -> None:
        text = text_of(Counted(SPARSE))
        divide(text, 4, tmp_path / "array")
        spoil(tmp_path / "array" / f"share-{text.key}-2of4")
        assert not are_there(text, 4, tmp_path / "array")
        made = put_together(text, tmp_path / "array")
        said = "mine: of its 4 shares 1 are missing or damaged (2/4); tokenising all of the text here"
        assert [record.getMessage() for record in caplog.records] == [said]
        assert contents(made) == self.whole(text, tmp_path)
        assert kinds(tmp_path / "array") == {"tokens"}

    def test_of_many_that_are_missing_some_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text = text_of(Counted(SPARSE))
        prepare_share(text, Share(1, 9), tmp_path)
        put_together(text, tmp_path)
        assert "of its 9 shares 8 are missing or damaged (0/9, 2/9, 3/9, 4/9, 5/9, …);" in caplog.text

    def test_a_damaged_share_is_made_again(self, tmp_path: Path, no_tokenising: Callable[[], None]) -> None:
        text = text_of(Counted(SPARSE))
        divide(text, 4, tmp_path / "array")
        (tmp_path / "array" / f"share-{text.key}-2of4" / "tokens.bin").write_bytes(b"cut")
        expected = self.whole(text, tmp_path)
        prepare_share(text, Share(2, 4), tmp_path / "array")
        no_tokenising()
        assert contents(put_together(text, tmp_path / "array")) == expected

    def test_of_two_arrays_the_one_that_is_whole(self, tmp_path: Path, no_tokenising: Callable[[], None]) -> None:
        text = text_of(Counted(SPARSE))
        expected = self.whole(text, tmp_path)
        prepare_share(text, Share(0, 2), tmp_path / "array")
        divide(text, 3, tmp_path / "array")
        no_tokenising()
        assert contents(put_together(text, tmp_path / "array")) == expected
        assert kinds(tmp_path / "array") == {"tokens"}, "and the other's go too"

    @pytest.mark.parametrize("now", [[*SPARSE[:-2], "other", ""], [*SPARSE, ""], ["", *SPARSE]])
    def test_a_source_that_changed_without_a_word(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, now: list[str]
    ) -> None:
        """As a data set of the hub without a revision may, between one task and the next."""
        texts = [text_of(Quiet(SPARSE)), text_of(Quiet(now))]
        for number, text in enumerate(texts):
            prepare_share(text, Share(number, 2), tmp_path / "array")
        made = put_together(texts[1], tmp_path / "array")
        assert "mine: its 2 shares were made of different texts, as the source has changed; token" in caplog.text
        assert contents(made) == self.whole(texts[1], tmp_path)

    def test_the_same_characters_in_other_documents(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        texts = [text_of(Quiet(["a", "b", "c", "xy", "z"])), text_of(Quiet(["a", "b", "c", "x", "yz"]))]
        for number, text in enumerate(texts):
            prepare_share(text, Share(number, 2), tmp_path)
        assert put_together(texts[0], tmp_path).meta["bytes"] == 6
        assert "different texts" in caplog.text

    def test_shares_in_blocks_of_another_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = text_of(Counted(SPARSE))
        prepare_share(text, Share(0, 2), tmp_path / "array")
        monkeypatch.setattr(share, "_BLOCK", 4)
        prepare_share(text, Share(1, 2), tmp_path / "array")
        made = put_together(text, tmp_path / "array")
        assert "different texts" in caplog.text
        assert contents(made) == self.whole(text, tmp_path)

    @pytest.mark.parametrize(
        ("name", "spoil", "said"),
        [
            *[
                (f"{name}.bin", None, "No such file or directory")
                for name in ("blocks", "documents", "tokens", "words")
            ],
            *[(f"{name}.bin", lambda raw: raw[:-16], "cut off") for name in ("documents", "tokens", "words")],
            ("blocks.bin", lambda raw: raw[:-8], "its 3 shares do not fit together"),
            ("blocks.bin", lambda raw: bytes(len(raw)), "its 3 shares do not fit together"),
        ],
    )
    def test_a_share_that_vanishes_or_changes_while_it_is_read(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        name: str,
        spoil: Callable[[bytes], bytes] | None,
        said: str,
    ) -> None:
        text = text_of(Counted(SPARSE), ByteLevelBPE(300).build(make_texts(50)), words=True)
        divide(text, 3, tmp_path / "array")
        array = share._array

        def spoilt(*arguments: Any) -> list[Cache]:
            found = array(*arguments)
            file = found[1].path / name
            file.unlink() if spoil is None else file.write_bytes(spoil(file.read_bytes()))
            return found

        monkeypatch.setattr(share, "_array", spoilt)
        made = put_together(text, tmp_path / "array")
        assert f"{said}; tokenising all of the text here" in caplog.text
        monkeypatch.undo()
        assert contents(made) == self.whole(text, tmp_path)


class TestAtOnce:
    """Tasks that finish together."""

    def test_of_two_that_put_together_the_slower_takes_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tokenising: Callable[[], None]
    ) -> None:
        """Where there are no locks, which says the patch of the cache; the faster has removed the shares."""
        text = text_of(Counted(SPARSE))
        monkeypatch.setattr("fcntl.flock", lambda *_: None)
        divide(text, 3, tmp_path)
        faster: list[Cache] = []

        def slow(folder: Path, text: Text, root: Path) -> Any:
            if not faster:
                monkeypatch.setattr(preparing, "merged", merged)
                faster.append(put_together(text, root))
            return merged(folder, text, root)

        monkeypatch.setattr(preparing, "merged", slow)
        no_tokenising()
        assert put_together(text, tmp_path) == faster[0]
        assert kinds(tmp_path) == {"tokens"}
        assert find(tmp_path, "tokens", text.key) == faster[0]

    @pytest.mark.parametrize("locks", [True, False])
    def test_four_processes_make_one_result(self, tmp_path: Path, locks: bool) -> None:
        paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_texts(3000, seed))) for seed, name in enumerate("ab")]
        code = """
import errno, fcntl, sys
from pathlib import Path
from llm.data import Files, share
from llm.data.parts import Plan
from llm.data.task import NextToken, Widths
from llm.tokenizer import ByteLevelBPE

def no_lock(*_):
    raise OSError(errno.ENOLCK, "no locks here")

if sys.argv[1] == "False":
    fcntl.flock = no_lock
share._BLOCK = 100
root, number, of = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sources = {path: Files(path) for path in sys.argv[5:]}
plan = Plan(sources, {"next": NextToken()}, Widths(64, 0), 20, 0, root)
if plan.share(ByteLevelBPE(300), number, of):
    for rows in plan.prepared(ByteLevelBPE(300)).train.values():
        print(rows.tokens_cache.meta["content"], rows.rows_cache.meta["rows"], rows.tokens_cache.path.name)
"""

        def start(cache: str, number: int, of: int) -> subprocess.Popen[str]:
            arguments = [str(locks), str(tmp_path / cache), str(number), str(of), *paths]
            command = [sys.executable, "-c", code, *arguments]
            root = Path(__file__).parents[2]
            return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        children = [start("array", number, 4) for number in range(4)]
        told = [child.communicate(timeout=100) for child in children]
        assert [child.returncode for child in children] == [0] * 4, told
        printed = {output for output, _ in told if output}
        assert len(printed) == 1, "some task was the last, and all that were saw the same"
        assert "tokenising all of the text here" not in "".join(errors for _, errors in told)
        one = start("one", 0, 1)
        assert {one.communicate(timeout=100)[0]} == printed
        mine, theirs = caches(tmp_path / "one"), caches(tmp_path / "array")
        named = {cache.path.name: contents(cache) for cache in theirs if cache.kind != "tokenizer"}
        assert named == {cache.path.name: contents(cache) for cache in mine if cache.kind != "tokenizer"}
        assert len(named) == 6
        left = {path.name.rpartition(".")[2] for path in (tmp_path / "array").iterdir() if "." in path.name}
        assert left <= {"lock"}, "and nothing half"
        assert not list((tmp_path / "array").glob("share-*"))
