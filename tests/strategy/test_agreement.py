"""The same losses everywhere: a strategy changes where numbers live, not what they are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llm.checkpoint import load
from tests.runs import FAMILIES, run_composed, run_together

# Dropout is the one thing that differs between numbers of processes: each draws its own.
SETTINGS = (
    "model.dropout=0",
    "model.tie_embeddings=true",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.qk_norm=true",
    "model.bias=true",
    "data.max_length=48",
    "data.batch_size=8",
    "optimizer.lr=1e-3",
    "optimizer.clip_norm=0.5",
    "schedule=constant",
    "schedule.warmup_steps=2",
    "trainer.max_steps=12",
    "trainer.val_check_interval=6",
    "callback.metrics.every_n_steps=1",
    "~callback.sample",
    "~callback.summary",
    "~callback.progress",
)
STRATEGIES = {
    "ddp x2": (2, ["strategy=ddp"]),
    "ddp x4": (4, ["strategy=ddp"]),
    "fsdp x2": (2, ["strategy=fsdp"]),
    "hsdp 2x2": (4, ["strategy=fsdp", "strategy.replicate_size=2"]),
    "fsdp+tp 2x2": (4, ["strategy=fsdp", "strategy.tensor_parallel_size=2"]),
}


class Curve(NamedTuple):
    """What a run comes to: a number per step, per validation, and the weights at its end."""

    losses: Tensor
    norms: Tensor
    tokens: list[float]
    validation: list[tuple[float, float]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Documents of which several share a row, and documents that each fill more than half of one: so every row is
    padded, each by another amount, and the processes count different numbers of tokens."""
    draw = random.Random(1)
    folder = tmp_path_factory.mktemp("corpora")
    lengths = {"packed": (3, 60), "unpacked": (25, 47)}
    for name, (shortest, longest) in lengths.items():
        texts = ("".join(draw.choices("abcdefgh ", k=draw.randint(shortest, longest))) for _ in range(240))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: folder / f"{name}.jsonl" for name in lengths}


def curve(run_dir: Path) -> Curve:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train/loss" in row]
    return Curve(
        torch.tensor([row["train/loss"] for row in train], dtype=torch.float64),
        torch.tensor([row["grad/norm"] for row in train], dtype=torch.float64),
        [row["tokens"] for row in rows],
        [
            (row["val/loss"], row.get("val/bits_per_byte", row.get("val/next_sentence_loss", 0.0)))
            for row in rows
            if "val/loss" in row
        ],
        dict(load(run_dir)[0].state_dict()),
    )


class Runs:
    """Runs of these settings, each made once."""

    def __init__(self, folder: Path, corpora: dict[str, Path], cache_dir: Path) -> None:
        self.folder, self.corpora, self.cache_dir = folder, corpora, cache_dir
        self.curves: dict[tuple[Any, ...], Curve] = {}

    def __call__(self, n: int, *overrides: str, corpus: str = "packed", n_micro_batches: int = 1) -> Curve:
        key = (n, corpus, n_micro_batches, *overrides)
        if key not in self.curves:
            run_dir = self.folder / str(len(self.curves))
            # The size that gives so many micro-batches: processes that share their data are not counted apart.
            shares = n // (2 if "strategy.tensor_parallel_size=2" in overrides else 1)
            arguments = [
                *SETTINGS,
                f"data.path={self.corpora[corpus]}",
                f"data.cache_dir={self.cache_dir}",
                f"data.micro_batch_size={8 // shares // n_micro_batches}",
                f"run_dir={run_dir}",
                f"trainer.devices={n}",
                *overrides,
            ]
            if n == 1:
                run_composed(arguments)
            else:
                run_together(n, arguments)
            self.curves[key] = curve(run_dir)
        return self.curves[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpora: dict[str, Path], cache_dir: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), corpora, cache_dir)


def assert_agree(one: Curve, other: Curve, tolerance: float, weights: float) -> None:
    assert len(one.losses) == 12
    torch.testing.assert_close(other.losses, one.losses, rtol=tolerance, atol=0)
    torch.testing.assert_close(other.norms, one.norms, rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.tensor(other.validation), torch.tensor(one.validation), rtol=tolerance, atol=0)
    assert other.tokens == one.tokens, "every token is counted once"
    torch.testing.assert_close(other.weights, one.weights, rtol=0, atol=weights)


# One micro-batch of about as many tokens everywhere, and two that differ most; the other two pairs on two ranks.
CASES = [(name, *case) for name in STRATEGIES for case in ((1, "packed"), (2, "unpacked"))]


@pytest.mark.parametrize(
    ("name", "n_micro_batches", "corpus"), [*CASES, ("ddp x2", 1, "unpacked"), ("fsdp x2", 2, "packed")]
)
def test_same_losses(runs: Runs, name: str, n_micro_batches: int, corpus: str) -> None:
    """AdamW at 1e-3, clipping active, fp32, 12 steps."""
    n, strategy = STRATEGIES[name]
    single = runs(1, corpus=corpus)
    assert (single.norms > 0.5).all(), "clipping is active"
    other = runs(n, *strategy, corpus=corpus, n_micro_batches=n_micro_batches)
    assert_agree(single, other, tolerance=1e-5, weights=1e-4)


@pytest.mark.parametrize("name", ["ddp x2", "fsdp x2", "fsdp+tp 2x2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_losses_of_other_families(runs: Runs, family: str, name: str) -> None:
    """Of hidden tokens with pairs, and of spans; two micro-batches, whose counts differ."""
    n, strategy = STRATEGIES[name]
    single = runs(1, *FAMILIES[family])
    other = runs(n, *FAMILIES[family], *strategy, n_micro_batches=2 if n == 2 else 1)
    assert_agree(single, other, tolerance=1e-5, weights=1e-4)


def test_same_losses_of_micro_batches(runs: Runs) -> None:
    assert_agree(runs(1), runs(1, n_micro_batches=2), tolerance=1e-5, weights=1e-4)


@pytest.mark.parametrize("name", ["ddp x2", "fsdp x2", "fsdp+tp 2x2"])
def test_same_losses_with_muon(runs: Runs, name: str) -> None:
    """Its orthogonalisation runs in bfloat16, which rounds otherwise where a matrix is split."""
    n, strategy = STRATEGIES[name]
    assert_agree(runs(1, "optimizer=muon"), runs(n, "optimizer=muon", *strategy), tolerance=2e-3, weights=2e-2)


def test_same_losses_under_mup(runs: Runs) -> None:
    """With rates of their own for weights that are spread by two axes."""
    mup = ["model.parametrization=mup", "model.base_dim=16", "+model.base_ffn_dim=48"]
    n, strategy = STRATEGIES["fsdp+tp 2x2"]
    single = runs(1, *mup)
    assert not torch.equal(single.losses, runs(1).losses)
    assert_agree(single, runs(n, *mup, *strategy), tolerance=1e-5, weights=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["ddp x2", "fsdp x2", "fsdp+tp 2x2"])
def test_same_losses_in_bfloat16(runs: Runs, name: str, precision: str) -> None:
    """Against float32 on one device."""
    n, strategy = STRATEGIES[name]
    other = runs(n, f"trainer.precision={precision}", *strategy)
    torch.testing.assert_close(other.losses, runs(1).losses, rtol=1e-2, atol=0)
    assert not torch.equal(other.losses, runs(1).losses)
