"""Scores in parts: the same loss and gradients, from less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.build import build
from llm.callback.record import Record
from llm.objective.loss import IGNORED
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import FAMILIES, Compose, run_composed, saved

VOCABULARY, WIDTH = 257, 32


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which was made in here."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.n = max([self.n, *(tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, Tensor))])
        return made


def gradients(compose_run: Compose, at_once: int | str, n_positions: int = 1000) -> tuple[Tensor, list[Tensor], int]:
    """Of the sum of the loss over random hidden states; and the largest tensor on the way."""
    _, objective = build(compose_run(f"objective.logits_at_once={at_once}", f"model.vocab_size={VOCABULARY}"))
    torch.manual_seed(0)
    objective.configure_model()
    hidden = torch.randn(n_positions, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (n_positions,))
    labels[::3] = IGNORED
    with Largest() as largest:
        nats = objective.nats(hidden, labels)
        nats.sum().backward()
        total = objective.nats(hidden, labels, "sum")
    assert not nats[::3].any()
    assert total.item() == pytest.approx(nats.sum().item(), rel=1e-5)
    assert hidden.grad is not None
    return nats.detach(), [hidden.grad, objective.network.head.weight.grad], largest.n


@pytest.mark.parametrize("at_once", [1, 7, 128, 999, 1000, 5000])
def test_parts_give_the_whole(compose_run: Compose, at_once: int) -> None:
    """Values and gradients, and no tensor is larger than a part's scores (or the head itself)."""
    whole, parts = gradients(compose_run, "null"), gradients(compose_run, at_once)
    torch.testing.assert_close(parts[:2], whole[:2], rtol=1e-5, atol=1e-5)
    assert whole[2] == 1000 * VOCABULARY
    assert parts[2] == max(min(at_once, 1000) * VOCABULARY, 1000 * WIDTH, VOCABULARY * WIDTH)


@pytest.mark.parametrize("family", ["decoder", *FAMILIES])
def test_a_run_has_the_same_losses(compose_run: Compose, tmp_path: Path, family: str) -> None:
    """Of each family, validation included; with dropout, as nothing is drawn behind the blocks."""
    rows: list[list[dict[str, Any]]] = []
    for at_once in ("null", "20"):
        here = tmp_path / at_once
        run(compose_run(*FAMILIES.get(family, []), f"objective.logits_at_once={at_once}", f"run_dir={here}"))
        rows.append([{k: v for k, v in row.items() if "speed" not in k} for row in Record(here).rows()])
    assert len(rows[0]) >= 5
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_it_works_with_sharded_weights(compose_run: Compose, tmp_path: Path, corpus: Path, cache_dir: Path) -> None:
    """The head's weight is still gathered when the backward computes the scores again."""
    settings = ["objective.logits_at_once=20", "model.dropout=0"]
    run(compose_run(*settings))
    places = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'two'}"]
    run_on_ranks(run_composed, 2, [*places, *settings, "strategy=fsdp", "trainer.devices=2"])
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("run", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
