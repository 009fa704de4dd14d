"""Scores of written answers while training: the same on any number of processes, and as `llm evaluate` has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.callback.record import Record
from llm.config import ConfigError
from llm.evaluate import Decoding, evaluate
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed

pytest.importorskip("sacrebleu", reason="comes with the extra evaluate")
WORDS = ["red", "green", "blue", "one", "two", "three", "cat"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    texts = [f"{WORDS[n % 7]} {WORDS[n * 3 % 7]}" for n in range(90)]
    path.write_text("".join(json.dumps({"low": text, "high": text.upper()}) + "\n" for text in texts))
    return path


def settings(path: Path) -> list[str]:
    return [
        *("model=tiny_encoder_decoder", "objective=seq2seq", "data/tasks=text_to_text", f"data.path={path}"),
        *("data.tasks.text_to_text.source='{low}'", "data.tasks.text_to_text.target='{high}'", "data.val_every=8"),
        *("callback.sample.prompts=[]", "model.dropout=0", "optimizer.lr=5e-3", "trainer.max_steps=20"),
        *("trainer.val_check_interval=20", "+callback.evaluate._target_=llm.callback.Evaluate"),
        *("+callback.evaluate.metrics=[chrf,distinct]", "+callback.evaluate.n_rows=9"),
        *("+callback.evaluate.max_new_tokens=12", "+callback.evaluate.batch_size=2"),
    ]


def scored(run_dir: Path) -> dict[str, float]:
    row = next(row for row in Record(run_dir).rows() if "val/chrf" in row)
    return {name: float(value) for name, value in row.items() if "chrf" in name or "distinct" in name}


def test_scores_are_those_of_the_command(compose_run: Compose, tmp_path: Path, pairs: Path) -> None:
    """Rows that are no examples are left out of both, where the task says so."""
    texts = pairs.read_text().splitlines()
    texts[7] = json.dumps({"low": "red", "high": ""})  # held out
    pairs.write_text("\n".join(texts))
    outcome = run(compose_run(*settings(pairs), "data.tasks.text_to_text.bad_rows=skip"))
    found = evaluate(
        tmp_path / "run", metrics=["chrf", "distinct"], decoding=Decoding(max_new_tokens=12, batch_size=32), limit=9
    )
    assert outcome.metrics["val/chrf"] == pytest.approx(found.scores["chrf"].value, abs=1e-4)
    assert scored(tmp_path / "run")["val/distinct_1"] == pytest.approx(found.scores["distinct_1"].value, abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_row_counts_once_on_two_processes(
    compose_run: Compose, tmp_path: Path, cache_dir: Path, pairs: Path, strategy: str
) -> None:
    """Nine rows do not divide among two; nobody waits for another's longer answers."""
    run(compose_run(*settings(pairs)))
    places = [f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'two'}"]
    run_on_ranks(run_composed, 2, [*settings(pairs), *places, f"strategy={strategy}", "trainer.devices=2"])
    assert scored(tmp_path / "two") == pytest.approx(scored(tmp_path / "run"), abs=1e-3)


def test_what_cannot_be_scored_says_why(compose_run: Compose) -> None:
    node = "+callback.evaluate._target_=llm.callback.Evaluate"
    with pytest.raises(ConfigError, match=r"callback\.evaluate\.metrics=\['blue'\]: must be some of bleu"):
        run(compose_run(node, "+callback.evaluate.metrics=[blue]"))
    with pytest.raises(ConfigError, match=r"scores written answers, of one task; data\.tasks has causal"):
        run(compose_run(node, "+callback.evaluate.metrics=[bleu]"))
