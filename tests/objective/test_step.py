"""The optimizer step: what it computes does not depend on how the batch is cut, and it never waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from llm.build import build
from llm.callback.record import Record
from llm.model import Transformer
from llm.objective.loss import n_labels, token_nats
from llm.objective.scale import Scale
from llm.run import run
from tests.runs import Compose, saved


class HostReads(TorchDispatchMode):
    """Counts `.item()` and its kin, which make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountHostReads(Callback):
    """Step -> how often it waited, from the first hook of the step to the last one of this callback."""

    reads: ClassVar[Counter[int]] = Counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.mode = HostReads()
        self.mode.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.mode.__exit__(None, None, None)
        self.reads[trainer.global_step] = self.mode.n


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_host_sync_between_flushes(compose_run: Compose, optimizer: str) -> None:
    CountHostReads.reads.clear()
    node = "+callback.reads={_target_: tests.objective.test_step.CountHostReads}"
    run(compose_run(f"optimizer={optimizer}", node, "packages=[tests]", "callback.metrics.every_n_steps=3"))
    assert CountHostReads.reads == dict.fromkeys(range(1, 7), 0)


def test_flush_steps_are_the_only_ones_that_read(compose_run: Compose) -> None:
    """The counter sees what it should: with the flush inside, `tolist` reads the totals."""
    with HostReads() as reads:
        torch.tensor(1.0).item()
    assert reads.n == 1


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in Record(run_dir).rows() if "train/loss" in row]


def test_micro_batch_split_changes_nothing(compose_run: Compose, tmp_path: Path) -> None:
    """AdamW, lr 1e-3, dropout 0, fp32, clipping active, rows of uneven token counts: 20 steps to 1e-5."""
    settings = (
        "model.dropout=0",
        "optimizer.lr=1e-3",
        "optimizer.clip_norm=0.5",
        "trainer.max_steps=20",
        "trainer.limit_val_batches=0",
        "callback.metrics.every_n_steps=1",
        "~callback.summary",
    )
    for size in (1, 2, 8):
        run(compose_run(*settings, f"data.micro_batch_size={size}", f"run_dir={tmp_path / str(size)}"))
    whole = losses(tmp_path / "8")
    assert len(whole) == 20
    for size in (1, 2):
        assert losses(tmp_path / str(size)) == pytest.approx(whole, abs=1e-5)
        parts, one = (saved(tmp_path / name)["state_dict"] for name in (str(size), "8"))
        torch.testing.assert_close(parts, one, rtol=0, atol=1e-4)


def test_step_is_the_plain_formula(compose_run: Compose) -> None:
    """One step of the objective against forward, mean loss over all tokens, clip and AdamW, written out."""
    cfg = compose_run(
        "model.dropout=0", "model.vocab_size=257", "trainer.max_steps=1", "schedule=constant", "optimizer.clip_norm=0.1"
    )
    cfg.callback = {}
    trainer, objective = build(cfg)
    data = instantiate(cfg.data, _convert_="all")
    objective.configure_model()
    start = {name: weight.clone() for name, weight in objective.network.state_dict().items()}
    trainer.fit(objective, datamodule=data)

    oracle = Transformer(objective.model_config)
    oracle.load_state_dict(start)
    optimizer = objective.optimizer_recipe.build(oracle)
    for group in optimizer.param_groups:
        group["lr"] *= objective.schedule(0)
    batch = {
        name: torch.cat([micro[name] for micro in data.train_dataloader().dataset[0].micro_batches])
        for name in ("tokens", "labels", "documents", "positions")
    }
    hidden = oracle(batch["tokens"], documents=batch["documents"], positions=batch["positions"])
    loss = torch.nn.functional.cross_entropy(oracle.logits(hidden).flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.1)
    optimizer.step()
    total, count = objective.train_totals.reduce()["loss"]
    assert total / count == pytest.approx(loss.item(), abs=1e-6)
    for name, weight in oracle.state_dict().items():
        torch.testing.assert_close(objective.network.state_dict()[name], weight, rtol=0, atol=1e-5, msg=name)


def test_a_part_without_labels_has_loss_zero_and_no_nan() -> None:
    logits = torch.randn(1, 4, 7, requires_grad=True)
    labels = torch.full((1, 4), -100)
    total = token_nats(logits[0], labels[0], "sum")
    scale = Scale([{"loss": n_labels(labels)}], labels.device)["loss"]
    assert (total.item(), scale) == (0.0, 1.0)
    (total * scale).backward()
    assert not logits.grad.isnan().any()  # type: ignore[union-attr]


def test_unclipped_gradient_is_logged_all_the_same(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("optimizer.clip_norm=null", "~callback.summary", "trainer.limit_val_batches=0"))
    assert all(row["grad/norm"] > 0 for row in Record(tmp_path / "run").rows() if "grad/norm" in row)
