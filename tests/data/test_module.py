"""TextData: each row of text reaches the model once, in the order that (seed, step) says, however it is divided."""

import math
import pickle
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import DataError, Files, TextData
from llm.data.collate import IGNORED, Step
from llm.data.steps import TrainSteps, ValSteps
from llm.tokenizer import ByteLevelBPE, Bytes
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(120)

TASKS = np.zeros(9, np.int64)  # of each part: all are of the one task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_jsonl(folder / "b.jsonl", make_texts(30, seed=1, longest=8))
    return folder


def make(folder: Path, recipe: Any = None, **arguments: Any) -> TextData:
    """Defaults of the tests: bytes of a.jsonl in rows of 64, 8 to a step."""
    if "sources" not in arguments:
        arguments.setdefault("path", str(folder / "a.jsonl"))
    defaults = {"max_length": 64, "batch_size": 8, "cache_dir": str(folder / "cache"), "val_every": 10}
    return TextData(recipe or Bytes(), **(defaults | arguments))


def mixture(folder: Path, **arguments: Any) -> TextData:
    sources = {"a": Files(str(folder / "a.jsonl"), weight=3.0), "b": Files(str(folder / "b.jsonl"), weight=1.0)}
    return make(folder, sources=sources, **arguments)


def on(data: TextData, rank: int = 0, world_size: int = 1, max_steps: int = 20) -> TextData:
    """`data` as a trainer of `world_size` processes holds it."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        max_steps=max_steps,
        lightning_module=SimpleNamespace(n_batches=3),
        state=SimpleNamespace(fn="fit"),
    )
    return data


def steps_of(data: TextData) -> list[Step]:
    return list(data.train_dataloader())


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class TestRows:
    """What is in a batch, against the stored documents."""

    @pytest.mark.parametrize("max_length", [1, 7, 64, 1000])
    def test_every_prediction_of_every_document_is_made_once(self, folder: Path, max_length: int) -> None:
        data = make(folder, max_length=max_length, val_every=None)
        rows = data._prepared.train["files", "causal_lm"]
        from llm.data.collate import assemble

        batch = assemble(rows, np.arange(len(rows)), True, 256)
        pairs = []
        for row in range(len(rows)):
            for document in range(1, batch["documents"][row].max() + 1):
                inside = batch["documents"][row] == document
                tokens, labels = batch["tokens"][row][inside], batch["labels"][row][inside]
                assert batch["positions"][row][inside].tolist() == list(range(inside.sum()))
                assert tokens[1:].tolist() == labels[:-1].tolist()
                pairs += list(zip(tokens.tolist(), labels.tolist(), strict=True))
            padding = batch["documents"][row] == 0
            assert (batch["labels"][row][padding] == IGNORED).all()
            assert (batch["tokens"][row][padding] == 256).all()
            assert (batch["positions"][row][padding] == 0).all()
        expected = [pair for text in TEXTS for pair in pairwise([256, *text.encode(), 256])]
        assert sorted(pairs) == sorted(expected)

    def test_without_document_masks_a_row_is_one_document(self, folder: Path) -> None:
        masked, open_ = make(folder).train_dataloader(), make(folder, document_mask=False).train_dataloader()
        for one, other in zip(masked, open_, strict=True):
            (a,), (b,) = one.micro_batches, other.micro_batches
            assert torch.equal(a["tokens"], b["tokens"])
            assert torch.equal(a["labels"], b["labels"])
            assert a.keys() - b.keys() == {"documents", "positions"}
            assert one.n_tokens == other.n_tokens == (a["documents"] > 0).sum()

    def test_types_and_shapes(self, folder: Path) -> None:
        (batch,) = steps_of(make(folder))[0].micro_batches
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        names = ("tokens", "labels", "documents", "positions")
        assert shapes == dict.fromkeys(names, (8, 64)) | {"samples": (8,), "tasks": (8,)}
        assert {value.dtype for value in batch.values()} == {torch.int64}


class TestSteps:
    def test_an_epoch_holds_each_row_once(self, folder: Path) -> None:
        data = make(folder)
        n_rows = len(data._prepared.train["files", "causal_lm"])
        steps = steps_of(data)
        assert len(steps) == data.n_steps(max_epochs=1) == -(-n_rows // 8)
        assert [step.index for step in steps] == list(range(len(steps)))
        samples = joined([batch for step in steps for batch in step.micro_batches])["samples"]
        assert sorted(samples[:n_rows].tolist()) == list(range(n_rows))
        assert samples.tolist() != sorted(samples.tolist())

    def test_no_row_mixes_sources_and_their_tokens_follow_the_weights(self, folder: Path) -> None:
        data = mixture(folder)
        data.trainer = None
        on(data, max_steps=400)
        n_rows = data.order.n_rows[0]
        batch = joined([batch for step in data.train_dataloader() for batch in step.micro_batches])
        labels = (batch["labels"] != IGNORED).sum(1)
        first = batch["samples"] < n_rows
        assert labels[first].sum() / labels.sum() == pytest.approx(0.75, abs=0.005)
        rows = list(data._prepared.train.values())
        for i in range(0, len(first), 101):
            source = 0 if first[i] else 1
            sample = int(batch["samples"][i]) - (0 if first[i] else n_rows)
            pieces = slice(int(rows[source].ends[sample - 1]) if sample else 0, int(rows[source].ends[sample]))
            starts, lengths = rows[source].starts[pieces], rows[source].lengths[pieces]
            stored = np.concatenate([rows[source].tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)])
            assert batch["tokens"][i][: len(stored)].tolist() == stored.tolist()

    @given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), micro=st.sampled_from([None, 1, 2]), index=st.integers(0, 1000))
    @settings(deadline=None, max_examples=40)
    def test_any_ranks_and_micro_batches_partition_the_batch(
        self, folder: Path, world: int, micro: int | None, index: int
    ) -> None:
        data = mixture(folder, batch_size=24)
        sources = list(data._prepared.train.values())
        (whole,) = TrainSteps(sources, TASKS, (0, 1, None), data._settings, data.order)[index].micro_batches
        shares = [
            TrainSteps(sources, TASKS, (rank, world, micro), data._settings, data.order)[index] for rank in range(world)
        ]
        sizes = {len(batch["samples"]) for share in shares for batch in share.micro_batches}
        assert sizes == {micro or 24 // world}
        parts = joined([batch for share in shares for batch in share.micro_batches])
        assert all(torch.equal(parts[name], whole[name]) for name in whole)

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_workers_change_nothing(self, folder: Path, num_workers: int) -> None:
        alone = steps_of(on(mixture(folder)))
        helped = steps_of(on(mixture(folder, num_workers=num_workers)))
        assert [step.index for step in helped] == list(range(20))
        for one, other in zip(alone, helped, strict=True):
            (a,), (b,) = one.micro_batches, other.micro_batches
            assert all(torch.equal(a[name], b[name]) for name in a)

    def test_datasets_travel_to_other_processes_without_their_maps(self, folder: Path) -> None:
        data = make(folder)
        dataset = data.train_dataloader().dataset
        before = dataset[0].micro_batches[0]["tokens"]
        packed = pickle.dumps(dataset)
        assert len(packed) < 10_000
        assert torch.equal(pickle.loads(packed)[0].micro_batches[0]["tokens"], before)

    def test_tokens_stay_in_their_file(self, folder: Path) -> None:
        rows = make(folder)._prepared.train["files", "causal_lm"]
        for array in (rows.tokens, rows.starts, rows.lengths, rows.ends):
            assert isinstance(array.base, np.memmap)
            assert not array.flags.writeable

    def test_seeds_change_the_order(self, folder: Path) -> None:
        first = [steps_of(make(folder, seed=seed))[0].micro_batches[0]["samples"].tolist() for seed in (0, 1, 0)]
        assert first[0] == first[2] != first[1]

    def test_pinning_keeps_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
        step = Step(7, [{"tokens": torch.zeros(2)}], 2).pin_memory()
        assert (step.index, step.micro_batches[0]["tokens"].tolist()) == (7, [1, 1])


class TestValidation:
    @pytest.mark.parametrize("world", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [1, 4, 7, None])
    def test_each_row_once_and_equally_many_batches(self, folder: Path, world: int, size: int | None) -> None:
        """30 rows a step: shared by any of these numbers of processes, whose last step is filled up."""
        data = mixture(folder)
        sources = list(data._prepared.val.values())
        n_rows = sum(map(len, sources))
        tables = [
            ValSteps(sources, TASKS, (rank, world, size), data._settings, 30, data.tokenizer.token_bytes)
            for rank in range(world)
        ]
        steps = [[table[index] for index in range(len(table))] for table in tables]
        for index in range(len(steps[0])):
            rows = joined([batch for mine in steps for batch in mine[index].micro_batches])["samples"]
            due = range(index * 30, min(n_rows, index * 30 + 30))
            assert sorted(rows[rows >= 0].tolist()) == list(due)
            n_batches = math.ceil(math.ceil(len(due) / world) / (size or 30 // world))
            assert len(steps[0][index].micro_batches) == n_batches, "none for nothing"
        batches = [[batch for step in mine for batch in step.micro_batches] for mine in steps]
        assert len({len(mine) for mine in batches}) == 1
        shapes = [[batch["tokens"].shape for batch in mine] for mine in batches]
        assert all(mine == shapes[0] for mine in shapes)
        assert {shape[0] for shape in shapes[0]} == {size or 30 // world}, "one shape, for compiled code"
        everything = joined([batch for mine in batches for batch in mine])
        real = everything["samples"] >= 0
        assert sorted(everything["samples"][real].tolist()) == list(range(n_rows))
        assert (everything["labels"][~real] == IGNORED).all()
        assert (everything["documents"][~real] == 0).all()
        assert (everything["n_bytes"][~real] == 0).all()
        assert everything["n_bytes"].sum() == sum(len(text.encode()) for text in data.val_texts())

    def test_the_last_batch_has_fewer_micro_batches_of_the_same_size(self, folder: Path) -> None:
        data = make(folder, batch_size=20, micro_batch_size=4)
        assert len(data._prepared.val["files", "causal_lm"]) == 30
        steps = list(data.val_dataloader())
        assert [[len(batch["samples"]) for batch in step.micro_batches] for step in steps] == [[4] * 5, [4] * 3]
        assert steps[1].micro_batches[2]["samples"].tolist() == [28, 29, -1, -1]

    def test_one_row_may_be_all_there_is_to_validate(self, folder: Path) -> None:
        (folder / "few.jsonl").write_text('{"text": "a b c"}\n' * 4)
        (step,) = make(folder, path=str(folder / "few.jsonl"), val_every=4).val_dataloader()
        assert step.micro_batches[0]["samples"].tolist() == [0] + [-1] * 7

    @pytest.mark.parametrize("recipe", [Bytes(), ByteLevelBPE(300)])
    def test_val_texts_are_the_held_out_documents(self, folder: Path, recipe: Any) -> None:
        assert list(make(folder, recipe).val_texts()) == TEXTS[9::10]

    def test_own_validation_files_hold_nothing_else_out(self, folder: Path) -> None:
        source = Files(str(folder / "a.jsonl"), val_path=str(folder / "b.jsonl"))
        data = make(folder, sources={"mine": source})
        assert list(data.val_texts()) == make_texts(30, seed=1, longest=8)
        assert data.report()["train"]["mine"]["documents"] == len(TEXTS)

    def test_the_end_of_a_long_text(self, tmp_path: Path) -> None:
        text = "".join(make_texts(20))
        (tmp_path / "book.txt").write_text(text, "utf-8")
        data = make(tmp_path, sources={"book": Files(str(tmp_path / "book.txt"), val_share=0.1)})
        cut = int(len(text) * 0.9)
        assert list(data.val_texts()) == [text[cut:]]
        batches = [batch for step in on(data).val_dataloader() for batch in step.micro_batches]
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        kept = sorted(labels[labels != IGNORED].tolist())
        assert kept == sorted([*text[cut:].encode(), data.tokenizer.eot_id])  # each once
        held_in = data._prepared.train["book", "causal_lm"]
        assert [data.tokenizer.decode(tokens) for tokens in held_in.documents()] == [text[:cut]]

    def test_nothing_held_out(self, folder: Path) -> None:
        data = make(folder, val_every=None)
        assert data.val_dataloader() == []
        assert list(data.val_texts()) == []
        assert data.report()["val"] == {}


class TestNumbers:
    def test_report_counts_what_is_there(self, folder: Path) -> None:
        data = make(folder)
        report = data.report()
        text = report["sources"]["files"]
        assert (text["documents"], text["empty"]) == (120, 0)
        assert text["bytes"] == text["tokens"] == sum(len(text.encode()) for text in TEXTS)
        train, val = report["train"]["files"], report["val"]["files"]
        assert train["documents"] + val["documents"] == 120
        assert train["inputs"] + val["inputs"] == text["tokens"] + 120
        assert train["cut"] == sum(len(t.encode()) + 1 > 64 for i, t in enumerate(TEXTS, 1) if i % 10)
        assert train["fill"] == pytest.approx(train["inputs"] / (train["rows"] * 64), abs=1e-6)
        assert report["vocab_size"] == 257

    def test_steps_for_tokens_and_epochs(self, folder: Path) -> None:
        data = mixture(folder)
        on(data, max_steps=100)
        steps = steps_of(data)
        labels = sum((step.micro_batches[0]["labels"] != IGNORED).sum().item() for step in steps)
        assert data.tokens_per_step == pytest.approx(labels / 100, rel=0.01)
        assert data.n_steps(max_tokens=10_000) == -(-10_000 // data.tokens_per_step)
        assert data.n_steps(max_epochs=2) == -(-2 * sum(data.order.n_rows) // 8)
        assert data.n_steps(max_tokens=1) == 1


class TestResume:
    def test_the_loader_goes_on_where_it_was(self, folder: Path) -> None:
        whole = steps_of(on(make(folder)))
        state = on(make(folder)).state_dict()
        assert state["next_batch"] == 3
        resumed = on(make(folder))
        resumed.load_state_dict(state)
        loader = resumed.train_dataloader()
        assert len(loader) == 20, "the trainer counts the steps of the whole run"
        rest = list(loader)
        assert [step.index for step in rest] == list(range(3, 20))
        for one, other in zip(whole[3:], rest, strict=True):
            assert torch.equal(one.micro_batches[0]["tokens"], other.micro_batches[0]["tokens"])

    def test_the_fingerprint_is_of_contents_not_places(self, folder: Path, tmp_path: Path) -> None:
        elsewhere = write_jsonl(tmp_path / "moved.jsonl", TEXTS)
        moved = make(folder, path=str(elsewhere), cache_dir=str(tmp_path / "cache"), num_workers=1, micro_batch_size=2)
        assert moved.fingerprint == make(folder).fingerprint

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch_size": 4}, r"changed data\.batch_size \(was 8, is 4\); restore it, or start a new run with init_"),
            ({"max_length": 32}, r"changed data\.max_length \(was 64, is 32\)"),
            ({"seed": 1}, r"changed data\.seed \(was 0, is 1\)"),
            ({"document_mask": False}, r"changed data\.document_mask \(was True, is False\)"),
            ({"val_every": 20}, r"changed the text or tokenizer"),
            ({"recipe": ByteLevelBPE(300)}, r"changed the text or tokenizer"),
        ],
    )
    def test_other_data_is_refused_by_name(self, folder: Path, change: dict[str, Any], message: str) -> None:
        state = on(make(folder)).state_dict()
        with pytest.raises(DataError, match=r"cannot resume on other data than the checkpoint's: " + message):
            make(folder, **change).load_state_dict(state)

    def test_other_weights_are_refused(self, folder: Path) -> None:
        state = on(mixture(folder)).state_dict()
        sources = {"a": Files(str(folder / "a.jsonl")), "b": Files(str(folder / "b.jsonl"))}
        with pytest.raises(DataError, match=r"changed the source weights"):
            make(folder, sources=sources).load_state_dict(state)


class TestRefused:
    def test_sources_and_path(self, folder: Path) -> None:
        message = r": exactly one of data\.sources and data\.path says what to read, but "
        with pytest.raises(ValueError, match=r"data\.path=None" + message + "neither is given"):
            TextData(Bytes())
        with pytest.raises(ValueError, match="data.path=a" + message + "both are given; for files alone: data=files"):
            TextData(Bytes(), sources={"a": Files("a")}, path="a")
        with pytest.raises(ValueError, match=r"data\.sources is empty: name at least one source"):
            TextData(Bytes(), sources={})
        with pytest.raises(ValueError, match=r"data\.val_every=1: must be at least 2, or null to hold nothing out"):
            TextData(Bytes(), path="a", val_every=1)
        for path in ("", []):  # neither the current folder, nor the default
            with pytest.raises(ValueError, match="of a data source: is empty; name a file"):
                TextData(Bytes(), path=path)

    @pytest.mark.parametrize(
        ("world", "micro", "message"),
        [
            (3, None, r"data\.batch_size=8: must be a multiple of 3 processes = 3; the nearest that are: 6 or 9"),
            (2, 3, r"multiple of 2 processes x data\.micro_batch_size=3 = 6; the nearest that are: 6 or 12"),
            (16, None, r"multiple of 16 processes = 16; the nearest that are: 16"),
        ],
    )
    def test_a_batch_that_cannot_be_shared(self, folder: Path, world: int, micro: int | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(folder, micro_batch_size=micro).check_world(world)
        make(folder, micro_batch_size=2).check_world(4)

    def test_a_run_without_end(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"trainer\.max_steps=-1: the data has no end of its own; say how many"):
            on(make(folder), max_steps=-1).train_dataloader()

    def test_a_split_without_documents(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"has 120 documents, and every 500th is held out: none for validation; set"
        ):
            make(folder, val_every=500).prepare()
        (tmp_path / "a.txt").write_text("one text")
        with pytest.raises(DataError, match=r"is one document, so none can be held out; read the paragraphs of a text"):
            make(folder, path=str(tmp_path / "a.txt")).prepare()
