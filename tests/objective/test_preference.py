"""Preferences: the loss of the paper, learnt with a frozen copy and with an adapter, on one process and on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.build import built
from llm.callback.record import Record
from llm.checkpoint import load, save
from llm.config import ConfigError
from llm.model import Transformer
from llm.objective.loss import IGNORED
from llm.run import run
from tests.runs import Compose, run_composed, run_together, saved

WORDS = ["red", "green", "blue", "one", "two"]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two answers that with an exclamation mark."""
    rows = [
        {"prompt": f"{WORDS[n % 5]}?", "chosen": f"{WORDS[n * 2 % 5]}!", "rejected": f"{WORDS[n * 3 % 5]}."}
        for n in range(60)
    ]
    path = tmp_path_factory.mktemp("preferences") / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("base") / "run"
    short = ["trainer.max_steps=2", "schedule.warmup_steps=0", "model.dropout=0", "~callback.summary"]
    run_composed([*short, f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={run_dir}"])
    return run_dir


def dpo(path: Path, base: Path) -> list[str]:
    return [
        *("objective=preference", "data/tasks=preference", f"data.path={path}", f"init_from={base}"),
        *("data.val_every=7", "model.dropout=0", "callback.sample.prompts=[]", "optimizer.lr=1e-3"),
        "~callback.summary",
    ]


@pytest.fixture(scope="module")
def alone(
    preferences: Path, base: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], tuple[list[str], Path]]:
    """`alone(adapter)`: settings, and the run of one process with them, made once."""
    folder = tmp_path_factory.mktemp("alone")

    def made(adapter: list[str]) -> tuple[list[str], Path]:
        settings = [*dpo(preferences, base), *adapter, "trainer.val_check_interval=3", f"data.cache_dir={cache_dir}"]
        run_dir = folder / ("adapter" if adapter else "copy")
        if not run_dir.exists():
            run_composed([*settings, f"run_dir={run_dir}"])
        return settings, run_dir

    return made


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
    """It is measured against the weights that it began with, though the run that they are of has gone on."""
    theirs = tmp_path / "base"
    shutil.copytree(base, theirs)
    settings = [*dpo(preferences, theirs), "schedule=constant", "trainer.val_check_interval=100"]
    run(compose_run(*settings))
    run(compose_run(*settings, f"run_dir={tmp_path / 'halves'}", "trainer.max_steps=3"))
    later = theirs / "checkpoints" / "step-00000009"
    weights = {name: weight + 1 for name, weight in saved(theirs)["state_dict"].items()}
    save(later, {f"model.{name}": weight for name, weight in weights.items()}, {}, [theirs / "config.yaml"])
    run(compose_run(*settings, f"run_dir={tmp_path / 'halves'}"))
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("run", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = [f"run_dir={tmp_path / 'halves'}", f"init_from={tmp_path / 'run'}", "trainer.max_steps=9"]
    with pytest.raises(ConfigError, match=r"init_from: .*/run - the run of .* is measured against .*base/checkpoints"):
        run(compose_run(*settings, *other))


@pytest.mark.parametrize(
    ("strategy", "adapter"), [("ddp", []), ("ddp", ["adapter=lora"]), ("fsdp", []), ("fsdp", ["adapter=lora"])]
)
def test_two_processes_train_the_same(
    alone: Callable[[list[str]], tuple[list[str], Path]], tmp_path: Path, strategy: str, adapter: list[str]
) -> None:
    settings, run_dir = alone(adapter)
    run_together(2, [*settings, f"run_dir={tmp_path}", f"strategy={strategy}", "trainer.devices=2"])
    one, two = (saved(path)["state_dict"] for path in (run_dir, tmp_path))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    rows = [Record(path).rows() for path in (run_dir, tmp_path)]
    for mine, theirs in zip(*rows, strict=True):
        assert {k: v for k, v in mine.items() if "speed" not in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "speed" not in k}, rel=1e-4, abs=1e-5
        )


def test_it_wants_weights_to_start_from(compose_run: Compose, preferences: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="init_from: null - a preference is measured against the weights") as told:
        run(compose_run(*dpo(preferences, base), "init_from=null", "data.document_mask=false"))
    assert "data.document_mask: false - pairs of answers are told apart by it" in str(told.value)


def test_its_reference_is_as_exact_and_scored_in_parts(compose_run: Compose, preferences: Path, base: Path) -> None:
    """At a rate of nothing no answer is preferred; with logits_at_once no more scores are there for the reference."""
    still = ["optimizer.lr=1e-30", "trainer.precision=bf16-true", "objective.logits_at_once=16"]
    cfg = compose_run(*dpo(preferences, base), *still, "trainer.max_steps=1", "schedule.warmup_steps=0")
    seen: list[int] = []
    real = Transformer.logits

    def counted(self: Transformer, hidden: torch.Tensor, **options: bool) -> torch.Tensor:
        seen.append(len(hidden))
        return real(self, hidden, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Transformer, "logits", counted)
        outcome = run(cfg)
    assert max(seen) == 16
    assert outcome.metrics["val/margin"] == 0
