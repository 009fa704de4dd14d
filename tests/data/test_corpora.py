"""Real text: the standard library, and the data sets that lie beside some checkouts."""

import time
from pathlib import Path

import numpy as np
import pytest

from llm.data import Files, StandardLibrary, TextData
from llm.data.order import Order
from llm.data.prepare import Held, prepare_rows
from llm.data.task import NextToken, Widths
from llm.tokenizer import Bytes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """In bytes: no tokenizer to train, and documents about four times as long."""
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    data = TextData(Bytes(), sources={"python": StandardLibrary()}, max_length=1024, cache_dir=cache_dir)
    data.prepare()
    return data


def test_the_standard_library_fills_its_rows(library: TextData) -> None:
    report = library.report()
    assert report["sources"]["python"]["bytes"] > 8e6
    assert report["train"]["python"]["fill"] >= 0.995
    n_documents = report["sources"]["python"]["documents"]
    assert report["val"]["python"]["documents"] == n_documents // 20
    # As long in bytes as 256 and 1024 tokens of 3.7 bytes.
    tokens = library._prepared.train["python", "causal_lm"].tokens_cache
    for max_length in (256, 950, 3800):
        rows = prepare_rows("python", tokens, Held(20), (NextToken(), Widths(max_length, 0)), library.cache_dir)
        assert rows.rows_cache.meta["fill"] >= 0.995


def test_the_held_out_text_is_the_files_themselves(library: TextData) -> None:
    texts = [text for text in StandardLibrary().documents() if text]
    assert list(library.val_texts()) == texts[19::20]


def test_reading_prepared_rows_is_fast(library: TextData) -> None:
    """Far below the bar on purpose (50 M tokens per CPU-second): this machine may be busy."""
    dataset = library.train_dataloader().dataset
    dataset[0]
    started = time.process_time()
    n_tokens = sum(dataset[index].micro_batches[0]["tokens"].numel() for index in range(100))
    assert n_tokens / (time.process_time() - started) > 10e6


def test_order_of_a_billion_rows_needs_no_memory_for_them() -> None:
    order = Order((10**9, 10**8), (10.0, 1.0), 512, 0)
    rows = np.concatenate([order.batch(index).row for index in range(10**5, 10**5 + 50)])
    assert len(np.unique(rows)) > 25_000
    assert rows.max() > 9e8


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("lm_wikitext2_validtest/wiki.valid.raw.gz", "line"),
        ("lm_tinyshakespeare/input.txt.gz", "paragraph"),
    ],
)
def test_texts_beside_the_checkout(shared_data: Path, tmp_path: Path, name: str, document: str) -> None:
    source = Files(str(shared_data / name), document=document)  # type: ignore[arg-type]
    data = TextData(Bytes(), sources={"text": source}, cache_dir=str(tmp_path))
    texts = list(source.documents())
    assert list(data.val_texts()) == texts[19::20]
    assert data.report()["sources"]["text"]["bytes"] == sum(len(text.encode()) for text in texts) > 1e6
    assert data.report()["train"]["text"]["fill"] > 0.995
