"""Preferences: the loss of the paper, learnt with a frozen copy and with an adapter, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.build import built
from llm.callback.record import Record
from llm.checkpoint import load
from llm.config import ConfigError
from llm.objective.loss import IGNORED
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed, saved

WORDS = ["red", "green", "blue", "one", "two"]


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """Of two answers that with an exclamation mark."""
    rows = [
        {"prompt": f"{WORDS[n % 5]}?", "chosen": f"{WORDS[n * 2 % 5]}!", "rejected": f"{WORDS[n * 3 % 5]}."}
        for n in range(60)
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(compose_run: Compose, tmp_path: Path) -> Path:
    short = ["trainer.max_steps=2", "schedule.warmup_steps=0", f"run_dir={tmp_path / 'base'}"]
    run(compose_run("model.dropout=0", *short))
    return tmp_path / "base"


def dpo(path: Path, base: Path) -> list[str]:
    return [
        *("objective=preference", "data/tasks=preference", f"data.path={path}", f"init_from={base}"),
        *("data.val_every=7", "model.dropout=0", "callback.sample.prompts=[]", "optimizer.lr=1e-3"),
    ]


def test_the_loss_is_the_papers(compose_run: Compose, preferences: Path, base: Path, tmp_path: Path) -> None:
    """Pair by pair, each answer by itself behind its prompt, in both networks."""
    settings = [*dpo(preferences, base), "data.val_every=null", "data.batch_size=2", "data.micro_batch_size=2"]
    cfg = compose_run(*settings, "trainer.max_steps=3", "schedule=constant", "schedule.warmup_steps=0")
    run(cfg)
    after, tokenizer = load(tmp_path / "run")
    before, _ = load(base)
    data = built(cfg.data)
    data.prepare()
    objective = built(cfg.objective)
    objective.model, objective._reference = after.train(), (before,)
    batch = data.train_dataloader().dataset[0].micro_batches[0]
    counts, parts = objective.counts(batch), objective.losses(batch)

    def log_probability(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        with torch.no_grad():
            table = model.logits(model(tokens.unsqueeze(0)))[0].log_softmax(-1)
        return sum(table[at, label].item() for at, label in enumerate(labels.tolist()) if label != IGNORED)

    margins = []
    for row in range(2):
        for pair in range(1, int(batch["documents"][row].max()) + 1):
            found = []
            for side in ("", "rejected_"):
                here = batch[f"{side}documents"][row] == pair
                tokens, labels = batch[f"{side}tokens"][row][here], batch[f"{side}labels"][row][here]
                found.append(log_probability(after, tokens, labels) - log_probability(before, tokens, labels))
                text = tokenizer.decode(labels[labels != IGNORED].tolist(), skip_special=True)
                assert text.endswith("!" if side == "" else ".")
            margins.append(0.1 * (found[0] - found[1]))
    assert len(margins) == counts["loss"] == counts["accuracy"] >= 4
    expected = -F.logsigmoid(torch.tensor(margins)).sum().item()
    assert parts["loss"].total.item() == pytest.approx(expected, abs=1e-4)
    assert parts["margin"].total.item() == pytest.approx(sum(margins), abs=1e-4)
    assert parts["accuracy"].total.item() == sum(margin > 0 for margin in margins)


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "optimizer.lr=0.02"]], ids=["copy", "adapter"])
def test_it_is_learnt(compose_run: Compose, tmp_path: Path, preferences: Path, base: Path, adapter: list[str]) -> None:
    longer = ["trainer.max_steps=20", "trainer.val_check_interval=20"]
    outcome = run(compose_run(*dpo(preferences, base), *adapter, *longer))
    assert outcome.metrics["val/accuracy"] == 1
    assert outcome.metrics["val/margin"] > 0.05
    rows = [row for row in Record(tmp_path / "run").rows() if "train/loss" in row]
    assert rows[0]["train/loss"] == pytest.approx(0.6931, abs=0.1)  # at the start no answer is preferred
    names = saved(tmp_path / "run")["state_dict"]
    assert len(names) == len(saved(base)["state_dict"]) + (8 if adapter else 0)  # the reference is not in it


def test_an_interrupted_run_goes_on_as_it_was(
    compose_run: Compose, tmp_path: Path, preferences: Path, base: Path
) -> None:
    settings = [*dpo(preferences, base), "schedule=constant", "trainer.val_check_interval=100"]
    run(compose_run(*settings))
    run(compose_run(*settings, f"run_dir={tmp_path / 'halves'}", "trainer.max_steps=3"))
    run(compose_run(*settings, f"run_dir={tmp_path / 'halves'}"))
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("run", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("strategy", "adapter"), [("ddp", []), ("ddp", ["adapter=lora"]), ("fsdp", []), ("fsdp", ["adapter=lora"])]
)
def test_two_processes_train_the_same(
    compose_run: Compose,
    tmp_path: Path,
    preferences: Path,
    cache_dir: Path,
    base: Path,
    strategy: str,
    adapter: list[str],
) -> None:
    settings = [*dpo(preferences, base), *adapter, "trainer.val_check_interval=3"]
    run(compose_run(*settings))
    places = [f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'two'}"]
    run_on_ranks(run_composed, 2, [*settings, *places, f"strategy={strategy}", "trainer.devices=2"])
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("run", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    rows = [Record(tmp_path / name).rows() for name in ("run", "two")]
    for mine, theirs in zip(*rows, strict=True):
        assert {k: v for k, v in mine.items() if "speed" not in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "speed" not in k}, rel=1e-4, abs=1e-5
        )


def test_it_wants_weights_to_start_from(compose_run: Compose, preferences: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="init_from=null: a preference is measured against the weights"):
        run(compose_run(*dpo(preferences, base), "init_from=null"))
