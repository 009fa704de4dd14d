"""What only a GPU can show; skipped where there is none. Kernels are compared with the plainest one in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import Transformer, TransformerConfig
from llm.objective import fused
from llm.objective.loss import token_nats
from llm.strategy import float8
from llm.strategy.attention import Kernel, use

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda")
CONFIG = TransformerConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, max_length=256, vocab_size=1001)


def batch(rows: int = 3, length: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, documents that lie one after the other with padding behind them, labels."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1001, (rows, length + 1), generator=draw)
    starts = torch.rand(rows, length, generator=draw) < 0.03
    documents = starts.long().cumsum(1) + 1
    documents[0, -20:] = 0
    return tokens[:, :-1].to(GPU), documents.to(GPU), tokens[:, 1:].to(GPU)


def trained(network: Transformer, precise: bool, documents: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of a batch."""
    tokens, places, labels = batch()
    if documents:
        labels = torch.where(places > 0, labels, -100)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not precise):
        hidden = network(tokens, documents=places if documents else None)
        loss = token_nats(network.logits(hidden.flatten(0, 1)), labels.flatten(), "sum") / labels.numel()
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters() if p.grad is not None]


def built(way: str = "dense", multiple: int = 1) -> Transformer:
    torch.manual_seed(0)
    with GPU:
        network = Transformer(CONFIG).train()
    network.mask_way = way  # type: ignore[assignment]
    assert network.head is not None
    network.head.multiple = multiple
    return network


def far(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference of two lists, tensor by tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def _precise() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_by_block_are_those_of_a_dense_mask(compiled: bool) -> None:
    """flex_attention, compiled by itself or within a compiled network."""
    use("math")
    loss, gradients = trained(built(), True, True)
    network = built("blocks")
    if compiled:
        network.compile()
    found, theirs = trained(network, True, True)
    use(None)
    assert (found - loss).abs() < 1e-4
    assert far(theirs, gradients) < 2e-3


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_every_kernel_of_attention_agrees(kernel: Kernel) -> None:
    use("math")
    loss, gradients = trained(built(), True, False)
    use(kernel)
    found, theirs = trained(built(), False, False)
    use(None)
    assert (found - loss).abs() < 2e-2
    assert far(theirs, gradients) < 5e-2


def test_a_padded_vocabulary_changes_nothing() -> None:
    loss, gradients = trained(built(), True, False)
    found, theirs = trained(built(multiple=64), True, False)
    assert (found - loss).abs() < 1e-5
    assert far(theirs, gradients) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_outcomes", "width"), [(50257, 50304), (1001, 1001), (4096, 4096), (10000, 10240)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_vocabulary(dtype: torch.dtype, n_outcomes: int, width: int, smoothing: float) -> None:
    """Its own kernels, beside torch's cross_entropy in float64."""
    draw = torch.Generator(GPU).manual_seed(0)
    scores = (torch.randn(37, width, generator=draw, device=GPU) * 4).to(dtype)
    scores[0] += 100
    labels = torch.randint(0, n_outcomes, (37,), generator=draw, device=GPU)
    labels[[3, 4]], labels[5] = -100, n_outcomes - 1
    weights = torch.rand(37, generator=draw, device=GPU)
    leaf = scores.clone().requires_grad_()
    nats = fused.token_nats(leaf * 1, labels, n_outcomes, smoothing)
    nats.backward(weights)
    exact = scores.double().requires_grad_()
    wanted = F.cross_entropy(exact[:, :n_outcomes], labels, reduction="none", label_smoothing=smoothing)
    wanted.backward(weights.double())
    torch.testing.assert_close(nats.double(), wanted, atol=2e-5, rtol=1e-5)
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 1e-2}
    torch.testing.assert_close(leaf.grad.double(), exact.grad, **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_compiled_code_computes_the_same(part: str) -> None:
    torch._dynamo.reset()
    loss, gradients = trained(built(multiple=64), True, False)
    network = built(multiple=64)
    for module in [network] if part == "whole" else network.blocks:
        module.compile()
    found, theirs = trained(network, True, False)
    assert (found - loss).abs() < 1e-4
    assert far(theirs, gradients) < 2e-3


def test_float8_is_near() -> None:
    pytest.importorskip("torchao", reason="torchao is an extra")
    loss, gradients = trained(built(), True, False)
    network = built()
    float8.convert(network)
    for block in network.blocks:
        block.compile()
    found, theirs = trained(network, False, False)
    assert (found - loss).abs() < 5e-2
    assert far(theirs, gradients) < 0.3


def test_parts_of_the_scores_take_less_memory() -> None:
    """Of 4,096 positions and 131,072 tokens in float32 scores alone are 2 GiB, kept twice."""
    from llm.objective.base import Objective

    torch.manual_seed(0)
    with GPU:
        network = Transformer(replace(CONFIG, vocab_size=131072, n_layers=1)).train()
    hidden = torch.randn(4096, CONFIG.dim, device=GPU, requires_grad=True)
    labels = torch.randint(0, 131072, (4096,), device=GPU)

    class Stub:
        label_smoothing, training, fused = 0.0, True, False

    peaks, losses = [], []
    for at_once in (None, 512):
        stub = Stub()
        stub.network, stub.logits_at_once = network, at_once  # type: ignore[attr-defined]
        stub._nats = partial(Objective._nats, stub)  # type: ignore[attr-defined, arg-type]
        torch.cuda.reset_peak_memory_stats()
        loss = Objective.nats(stub, hidden, labels, "sum")  # type: ignore[arg-type]
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        losses.append(loss.item())
        network.zero_grad()
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]
    assert peaks[1] < peaks[0] / 3


def test_a_run_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    """train.py as its user starts it: compiled, in bfloat16, fastest kernel; twelve steps at once and in two parts."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {n} of a text. " * 20}) + "\n" for n in range(400)))
    run = [
        *("data=files", f"data.path={text}", "data.cache_dir=" + str(tmp_path / "cache"), "tokenizer=bytes"),
        *("logger=none", "schedule.warmup_steps=2", "trainer.val_check_interval=6", "trainer.accelerator=gpu"),
        *("strategy.compile=auto", "callback.checkpoint.every_n_train_steps=6", "callback.metrics.every_n_steps=1"),
        *("+trainer.deterministic=true", "callback.sample.prompts=[]", "trainer.max_steps=12"),
    ]

    def train(folder: str, *more: str) -> list[float]:
        command = [sys.executable, str(ROOT / "train.py"), *run, f"run_dir={tmp_path / folder}", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode in (0, 75), done.stdout[-3000:] + done.stderr[-3000:]
        rows = [json.loads(row) for row in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    straight = train("straight")
    fault = "+callback.rehearsal={_target_: llm.callback.Rehearsal, fault: SIGTERM, step: 7}"
    train("parts", fault)
    parts = train("parts", "resume=auto")
    assert len(straight) == 12
    assert parts == straight
