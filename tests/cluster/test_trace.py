"""What a step on fake tensors says of memory, against what the allocator gave in real runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig

from llm.model import Transformer
from llm.plan.subject import Stated, Subject, subject
from llm.plan.trace import KINDS, Played, peak, trace
from tests.cluster.measured import measured_peak
from tests.ranks import run_on_ranks
from tests.runs import FAMILIES, composed

ROOT = Path(__file__).parents[2]
SIZES = ["model.dim=128", "model.n_heads=4", "model.ffn_dim=512", "model.n_layers=3", "model.dropout=0.0"]
ROWS = ["data.max_length=128", "data.batch_size=8", "data.micro_batch_size=4", "trainer.limit_val_batches=0"]
WITHOUT = [f"~callback.{name}" for name in ("sample", "summary", "progress", "checkpoint")]


def planned(overrides: list[str], **stated: str) -> Subject:
    return subject(composed(overrides), Stated(**stated))


CASES = {
    "decoder": [],
    "dropout": ["model.dropout=0.1"],
    "muon": ["optimizer=muon"],
    "full": ["strategy.checkpointing=full", "data.micro_batch_size=8"],
    "selective": ["strategy.checkpointing=selective"],
    "gated": ["model.activation=swiglu", "model.norm=rms", "model.n_kv_heads=2"],
    "parts": ["objective.logits_at_once=256"],
    "encoder": FAMILIES["encoder"],
    "encoder-decoder": FAMILIES["encoder-decoder"],
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_the_allocator_gave(name: str, texts: Path, tmp_path: Path) -> None:
    run = [f"data.path={texts}", *SIZES, *ROWS, *WITHOUT, *CASES[name]]
    measured = measured_peak([*run, f"run_dir={tmp_path / 'run'}"], str(tmp_path))
    _, kinds = peak(planned(run).moments)
    assert sum(kinds.values()) == pytest.approx(measured, rel=0.1)


STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "fsdp, bf16": ["strategy=fsdp", "trainer.precision=bf16-true"],
    "tensor": ["strategy=fsdp", "strategy.tensor_parallel_size=2", "data.micro_batch_size=8"],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_peak_of_two_ranks(name: str, texts: Path, tmp_path: Path) -> None:
    run = [f"data.path={texts}", *SIZES, *ROWS, *WITHOUT, "trainer.devices=2", *STRATEGIES[name]]
    measured = run_on_ranks(measured_peak, 2, [*run, f"run_dir={tmp_path / 'run'}"], str(tmp_path))
    _, kinds = peak(planned(run).moments)
    assert sum(kinds.values()) == pytest.approx(measured[0], rel=0.1)


RECORDED = {
    "124M: ours": ["model=gpt2_124m"],
    "350M: ours": ["model=gpt2_355m"],
    "1.56B: ours": ["model=gpt2_1558m"],
    "1.3B: ours": [
        "model=gpt2_124m",
        "model.dim=2048",
        "model.n_layers=24",
        "model.n_heads=16",
        "data.max_length=2048",
    ],
    "124M: ours, rotary": ["model=gpt2_124m", "model.position=rotary", "model.tie_embeddings=false"],
}


@pytest.mark.parametrize("case", RECORDED)
def test_the_peak_of_a_gpu(case: str) -> None:
    """torch.cuda.max_memory_allocated on one H200, of compiled runs that benchmarks/run.py gpu made."""
    rows = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())["sizes"]["rows"]
    (note,) = {row["note"] for row in rows if row["case"] == case}
    told = re.match(r"(\d+) x (\d+) x (\d+), .* peak ([\d.]+) GiB", note)
    assert told is not None
    n_micro, n_rows, length, gib = int(told[1]), int(told[2]), int(told[3]), float(told[4])
    compile = "blocks" if case.startswith("1.") else "whole"
    overrides = ["data.path=x", "data.document_mask=false", "trainer.precision=bf16-mixed", "trainer.accelerator=auto"]
    cfg = composed(
        [
            *overrides,
            *RECORDED[case],
            f"data.max_length={length}",
            "model.max_length=${data.max_length}",
            f"data.batch_size={n_micro * n_rows}",
            f"data.micro_batch_size={n_rows}",
            f"strategy.compile={compile}",
            "model.dropout=0.0",
        ]
    )
    for key in ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size"):  # those of the shipped model, not of TINY
        cfg.model[key] = _shipped(RECORDED[case])[key]
    _, kinds = peak(subject(cfg, Stated(gpu="H200")).moments)
    assert sum(kinds.values()) / 2**30 == pytest.approx(gib, rel=0.05)


def _shipped(overrides: list[str]) -> DictConfig:
    node: DictConfig = composed(overrides, []).model
    return node


@pytest.mark.parametrize(("name", "strategy"), [("encoder-decoder", "single"), ("decoder", "fsdp")])
def test_a_few_blocks_tell_what_all_of_them_need(name: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a trace of the whole network."""
    layers = ["model.n_layers=6", *(["model.n_decoder_layers=5"] if name == "encoder-decoder" else [])]
    spread = ["strategy=fsdp", "trainer.devices=2"] if strategy == "fsdp" else []
    found = planned(["data.path=x", *SIZES, *ROWS, *CASES[name], *layers, *spread])
    few = found.moments
    monkeypatch.setattr("llm.plan.trace._FEW", 100)
    played = Played(found.world_size, found.precision, False, found.rows, found.n_micro_batches)
    whole = trace(found.objective, found.strategy, found.data, played)
    for moment, kinds in few.items():
        assert sum(kinds.values()) == pytest.approx(sum(whole[moment].values()), rel=0.01), moment


def test_kinds_are_what_they_are_called() -> None:
    """Of a run whose weights, gradients and moments are known."""
    found = planned(["data.path=x", *SIZES, *ROWS])
    kinds = found.moments["update"]
    n_bytes = 4 * Transformer(found.model).n_parameters()
    assert set(kinds) == set(KINDS)
    assert kinds["parameters"] == n_bytes
    assert kinds["gradients"] == pytest.approx(n_bytes, rel=1e-3)
    assert kinds["optimizer"] == pytest.approx(2 * n_bytes, rel=1e-3)
    scores = 4 * 128 * 257 * 4  # float32, kept as log-probabilities and made into their gradient
    assert found.moments["loss"]["logits"] >= 2 * scores
