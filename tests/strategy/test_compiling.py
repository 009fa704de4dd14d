"""What torch.compile makes of a run: few graphs, without a break, and the same losses."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm.config import ConfigError, check
from llm.model import Transformer, TransformerConfig
from llm.strategy.compiling import WHOLE_UP_TO, resolve
from tests.ranks import run_on_ranks
from tests.runs import FAMILIES, Compose, run_composed

SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=2", "callback.metrics.every_n_steps=1", "model.dropout=0"]


@pytest.fixture(scope="module")
def corpus_of_odd_lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which 13 rows or so are held out: the last batch of a validation is not full, nor is its last micro-batch."""
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("corpus") / "odd.jsonl"
    texts = ("".join(draw.choices("abcdefgh ", k=draw.randint(3, 60))) for _ in range(240))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def counted(arguments: list[str], backend: str = "eager") -> tuple[int, dict[str, int], list[float]]:
    """Graphs, breaks between them, and the losses of a run."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # The graphs are looked at here; generating C++ from them is slow.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        outcome = run_composed(arguments)
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    torch._dynamo.reset()
    rows: list[dict[str, Any]] = [json.loads(x) for x in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()]
    return graphs, breaks, [row[key] for row in rows for key in ("train/loss", "val/loss") if key in row]


# Made once for training and once for validation: the network or each kind of its blocks, and the loss.
CASES = {
    "decoder, in parts": (1, [], ["compile=whole", "checkpointing=full"], 4),
    "encoder, ddp": (2, FAMILIES["encoder"], ["compile=whole", "checkpointing=selective"], 4),
    "decoder, fsdp": (2, [], ["compile=blocks", "checkpointing=selective"], 4),
    "encoder-decoder": (1, FAMILIES["encoder-decoder"], ["compile=whole", "checkpointing=none"], 4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_compiles_once_and_loses_the_same(
    name: str, corpus_of_odd_lengths: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Rows of several documents, hidden tokens in changing numbers, micro-batches, and validations whose last batch is
    not full."""
    n, family, settings, n_graphs = CASES[name]
    strategy = "single" if n == 1 else name.rpartition(" ")[2]
    common = [
        *SHORT,
        *family,
        f"strategy={strategy}",
        f"data.path={corpus_of_odd_lengths}",
        f"data.cache_dir={cache_dir}",
        "data.micro_batch_size=2",
        f"trainer.devices={n}",
        f"objective.logits_at_once={40 if 'parts' in name else 'null'}",
    ]
    eager = [*common, f"run_dir={tmp_path / 'eager'}"]
    compiled = [*common, *(f"strategy.{setting}" for setting in settings), f"run_dir={tmp_path / 'compiled'}"]
    (none, _, expected), *_ = run_on_ranks(counted, n, eager) if n > 1 else [counted(eager)]
    results = run_on_ranks(counted, n, compiled) if n > 1 else [counted(compiled)]
    assert none == 0
    for graphs, breaks, losses in results:
        assert breaks == {}
        assert graphs == n_graphs
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_what_auto_means() -> None:
    """Small networks whole, large ones by block, as those that are spread over processes; nothing on a CPU."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with torch.device("meta"):
        small = Transformer(TransformerConfig(dim=64, n_layers=1, n_heads=2, max_length=8, vocab_size=50))
        large = Transformer(TransformerConfig(dim=2048, n_layers=10, n_heads=16, max_length=8, vocab_size=1024))
    assert small.n_parameters() < WHOLE_UP_TO < large.n_parameters()
    assert [resolve("auto", network, gpu) for network in (small, large)] == ["whole", "blocks"]
    assert resolve("auto", small, gpu, spread=True) == "blocks"
    assert resolve("auto", small, cpu) == "none"
    assert resolve("whole", large, cpu) == "whole", "who asks for it gets it"


def test_what_is_spread_is_not_compiled_as_a_whole(compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.compile: 'whole' - must be 'none' or 'blocks' or 'auto'"):
        check(compose_run("strategy=fsdp", "strategy.compile=whole"))
