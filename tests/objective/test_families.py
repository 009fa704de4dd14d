"""Masked LM and sequence to sequence against the formulas written out, position by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from llm.callback import Metrics
from llm.callback.record import Record
from llm.data import Step
from llm.data.collate import to_step
from llm.model import Source, TransformerConfig
from llm.objective import CausalLM, MaskedLM, Objective, Seq2Seq
from llm.objective.loss import IGNORED, token_nats
from llm.objective.masked_lm import places
from llm.optimizer import AdamW

V, B, T, P = 30, 3, 12, 2


def built(kind: type[Objective], tasks: tuple[str, ...] = (), **changes: Any) -> Objective:
    torch.manual_seed(0)
    family = {"family": kind.family, "dim": 16, "n_layers": 1, "n_heads": 2, "max_length": 32, "vocab_size": V}
    objective = kind(TransformerConfig(**{**family, **changes}), None, lambda _: 1.0)  # type: ignore[arg-type]
    objective.configure_model()
    objective.task_names = list(tasks)
    return objective


def rows(length: int = T) -> dict[str, torch.Tensor]:
    """Two documents and padding in every row; a third of the places predicted, of the last row none."""
    draw = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(V, (B, length), generator=draw) for _ in range(2))
    documents = torch.tensor([1] * 5 + [2] * 4 + [0] * (length - 9)).expand(B, -1)
    hidden = (torch.rand(B, length, generator=draw) > 0.4) | (documents == 0)
    hidden[2] = True
    positions = torch.cat([torch.arange(5), torch.arange(4), torch.zeros(length - 9, dtype=torch.long)]).expand(B, -1)
    return {
        "tokens": tokens,
        "labels": labels.masked_fill(hidden, IGNORED),
        "documents": documents,
        "positions": positions,
        "segments": torch.zeros_like(tokens),
        "tasks": torch.tensor([0, 1, 1]),
    }


def naive(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Nats of each row."""
    table = logits.log_softmax(-1)
    return [
        -sum(table[b, t, label].item() for t, label in enumerate(row) if label != IGNORED)
        for b, row in enumerate(labels.tolist())
    ]


def test_masked_lm_is_the_loss_of_all_logits() -> None:
    objective, batch = built(MaskedLM, n_segments=2), rows()
    trained = objective.losses(batch)["loss"]  # of one task nobody asks for rows in training
    objective.eval()
    part = objective.losses(batch)["loss"]
    assert trained.total.item() == pytest.approx(part.total.item(), rel=1e-6)
    network = objective.network
    hidden = network(batch["tokens"], batch["documents"], batch["positions"], segments=batch["segments"])
    expected = naive(network.logits(hidden), batch["labels"])
    assert part.total.item() == pytest.approx(sum(expected), abs=1e-4)
    assert part.rows is not None
    assert part.rows[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert part.rows[1].tolist() == (batch["labels"] != IGNORED).sum(1).tolist()
    assert objective.counts(batch)["loss"] == (batch["labels"] != IGNORED).sum()


def test_masked_lm_has_the_gradients_of_all_logits() -> None:
    objective, batch = built(MaskedLM), rows()
    network = objective.network
    objective.losses(batch)["loss"].total.backward()
    found = [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]
    network.zero_grad()
    hidden = network(batch["tokens"], batch["documents"], batch["positions"])
    token_nats(network.logits(hidden).flatten(0, 1), batch["labels"].flatten()).sum().backward()
    torch.testing.assert_close(found, [w.grad for w in network.parameters() if w.grad is not None])


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129])
def test_places_hold_every_predicted_one_and_come_in_few_shapes(n: int) -> None:
    labels = torch.full((4, 64), IGNORED)
    chosen = torch.randperm(256, generator=torch.Generator().manual_seed(n))[:n].sort().values
    labels.view(-1)[chosen] = chosen
    found = places(labels)
    at, values = found["predicted_at"], found["predicted_labels"]
    assert len(at) == len(values) == max(1, -(-n // 128)) * 128
    assert torch.equal(at[values != IGNORED], chosen)
    assert torch.equal(values[values != IGNORED], chosen)


def test_places_are_found_before_the_batch_travels() -> None:
    objective, batch = built(MaskedLM), rows()
    without = objective.losses(dict(batch))["loss"]
    step = objective.on_before_batch_transfer(Step(0, [batch], 0), 0)
    assert step.counts == [{"loss": int((batch["labels"] != IGNORED).sum())}]
    assert "predicted_at" in step.micro_batches[0]
    assert torch.equal(objective.losses(step.micro_batches[0])["loss"].total, without.total)


def test_nothing_predicted_gives_zero_and_gradients_of_zero() -> None:
    objective, batch = built(MaskedLM), rows()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    part = objective.losses(batch)["loss"]
    part.total.backward()
    assert (part.total.item(), objective.counts(batch)) == (0.0, {"loss": 0})
    assert all(w.grad is not None and not w.grad.any() for w in objective.network.blocks[0].parameters())


def test_pairs_are_judged_by_their_first_token() -> None:
    objective, batch = built(MaskedLM, next_sentence=True, n_segments=2), rows()
    batch["cls_at"] = torch.tensor([[0, 5], [0, 5], [0, 0]])
    batch["pair_labels"] = torch.tensor([[0, 1], [1, 1], [0, IGNORED]])
    parts = objective.losses(batch)
    network = objective.network
    hidden = network(batch["tokens"], batch["documents"], batch["positions"], segments=batch["segments"])
    nats, n_right = 0.0, 0
    for row, at, label in ((0, 0, 0), (0, 5, 1), (1, 0, 1), (1, 5, 1), (2, 0, 0)):
        scores = network.next_sentence(torch.tanh(network.pooler(hidden[row, at])))  # type: ignore[misc]
        nats -= scores.log_softmax(-1)[label].item()
        n_right += int(scores.argmax() == label)
    assert parts["next_sentence_loss"].total.item() == pytest.approx(nats, abs=1e-5)
    counts = objective.counts(batch)
    assert counts["next_sentence_loss"] == counts["next_sentence_accuracy"] == 5
    accuracy = parts["next_sentence_accuracy"]
    assert (accuracy.total.item(), accuracy.weight) == (n_right, 0.0)
    sums = {name: (total.item(), count) for name, (total, count) in objective.sums(parts, counts, batch).items()}
    means = objective.means(sums)
    assert means["next_sentence_accuracy"] == n_right / 5
    assert means["next_sentence_pairs"] == 5
    assert set(counts) == set(parts)


def test_seq2seq_is_teacher_forcing() -> None:
    objective, batch = built(Seq2Seq), rows()
    source = rows(14)
    batch |= {f"source_{name}": source[name] for name in ("tokens", "documents", "positions")}
    part = objective.losses(batch)["loss"]
    network = objective.network
    read = Source(source["tokens"], source["documents"], source["positions"])
    hidden = network(batch["tokens"], batch["documents"], batch["positions"], source=read)
    expected = naive(network.logits(hidden), batch["labels"])
    assert part.total.item() == pytest.approx(sum(expected), abs=1e-4)
    alone = network(batch["tokens"][:1, 5:9], source=Source(source["tokens"][:1, 5:9]))  # document 2 of row 0
    assert sum(expected[:1]) == pytest.approx(
        naive(network.logits(network(batch["tokens"][:1, :5], source=Source(source["tokens"][:1, :5]))),
              batch["labels"][:1, :5])[0]
        + naive(network.logits(alone), batch["labels"][:1, 5:9])[0],
        abs=1e-4,
    )  # fmt: skip


def test_each_of_several_tasks_has_a_curve() -> None:
    objective, batch = built(MaskedLM, ("light", "heavy", "absent")), rows()
    parts = objective.losses(batch)
    sums = objective.sums(parts, objective.counts(batch), batch)
    totals, counts = parts["loss"].rows  # type: ignore[misc]
    assert list(sums) == ["loss", "loss/light", "loss/heavy", "loss/absent"]
    assert sums["loss/light"][0] == totals[0]
    assert sums["loss/heavy"][0] == totals[1] + totals[2]
    assert [int(sums[f"loss/{name}"][1]) for name in ("light", "heavy", "absent")] == [counts[0], sum(counts[1:]), 0]
    means = objective.means({name: (float(total), float(count)) for name, (total, count) in sums.items()})
    assert set(means) == {"loss", "loss/light", "loss/heavy"}  # nothing seen is not a loss of 0
    assert list(built(MaskedLM, ("one",)).sums(parts, objective.counts(batch), batch)) == ["loss"]


def test_bits_per_byte_are_of_rows_that_are_text() -> None:
    objective, batch = built(CausalLM), rows()
    objective.eval()  # as in validation: rows are told apart
    batch["n_bytes"] = torch.tensor([7, 0, 0])
    parts = objective.losses(batch)
    sums = {**objective.sums(parts, objective.counts(batch), batch), **objective.validation_sums(batch, parts)}
    plain = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    metrics = objective.validation_metrics(plain)
    nats = parts["loss"].rows[0][0].item()  # type: ignore[index]
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / 7 / 0.6931472, rel=1e-5)
    assert set(metrics) == {"val/loss", "val/bits_per_byte"}


def test_a_model_of_another_family_is_refused() -> None:
    config = TransformerConfig(dim=8, n_layers=1, n_heads=2, max_length=8)
    message = "model.family=decoder: MaskedLM trains a model.family=encoder; take another objective= or model="
    with pytest.raises(ValueError, match=message):
        MaskedLM(config, None, lambda _: 1.0)  # type: ignore[arg-type]


class Steps(L.LightningDataModule):
    """Three steps of two micro-batches, and the same to validate on."""

    def __init__(self, batch: dict[str, torch.Tensor], task_names: list[str]) -> None:
        super().__init__()
        self.batch, self.task_names = batch, task_names

    def train_dataloader(self) -> Any:
        arrays = {name: torch.cat((rows, rows)).numpy() for name, rows in self.batch.items()}
        return DataLoader([to_step(i, arrays, B) for i in range(3)], batch_size=None)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.parametrize("kind", [MaskedLM, Seq2Seq])
def test_a_run_writes_rows_of_every_part(kind: type[Objective], tmp_path: Path) -> None:
    changes = {"next_sentence": True, "n_segments": 2} if kind is MaskedLM else {}
    objective, batch = built(kind, **changes), rows()
    del objective._trainer
    objective.optimizer_recipe = AdamW(lr=1e-2)
    if kind is MaskedLM:
        batch |= {"cls_at": torch.tensor([[0, 5]] * B), "pair_labels": torch.tensor([[0, 1], [1, 1], [0, IGNORED]])}
    else:
        batch |= {f"source_{name}": batch[name] for name in ("tokens", "documents", "positions")}
    trainer = L.Trainer(
        max_steps=3,
        val_check_interval=3,
        accelerator="cpu",
        logger=False,
        callbacks=[Metrics(every_n_steps=1)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(objective, datamodule=Steps(batch, ["light", "heavy"]))
    first, *_, last, validated = Record(tmp_path).rows()
    parts = {"loss", "loss/light", "loss/heavy"}
    if kind is MaskedLM:
        parts |= {"next_sentence_loss", "next_sentence_accuracy", "next_sentence_pairs"}
        assert first["train/next_sentence_pairs"] == 10
    assert {name.removeprefix("train/") for name in first if name.startswith("train/")} == parts
    assert {name.removeprefix("val/") for name in validated if name.startswith("val/")} == parts
    assert validated["val/loss"] < last["train/loss"] < first["train/loss"]  # type: ignore[operator]
    assert first["tokens"] == 2 * B * 9 * (2 if kind is Seq2Seq else 1)
    labels = batch["labels"][batch["labels"] != IGNORED]
    shares = torch.bincount(labels) / len(labels)
    assert objective.unigram_loss == pytest.approx(torch.special.entr(shares).sum().item(), abs=1e-5)
