"""An exported folder under EleutherAI's lm_eval, as it is: the same figures as `python -m llm evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llm.checkpoint import export_folder, find
from llm.evaluate import evaluate, task_from
from llm.run import run
from tests.runs import CONF, Compose

WORDS = ["cat", "dog", "tree", "house", "river", "stone", "bird", "cloud", "road", "light"]


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_lm_eval_finds_the_same(compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices by likelihood and whole texts: tasks from local files, no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is in the extra `test`")
    from lm_eval.tasks import TaskManager

    shape = ("model.norm=rms", "model.activation=swiglu", "model.max_length=64")  # of an architecture that they have
    run(compose_run(*shape, "trainer.max_steps=6", "data.max_length=32"))
    choices = [
        {"query": f"The {w}", "choices": [f"{w} runs", "sleeps", "is"], "gold": n % 3} for n, w in enumerate(WORDS)
    ]
    texts = [{"text": f"The {w} is here, and the {v} there."} for w, v in zip(WORDS, reversed(WORDS), strict=True)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    files = {"choices": written(tmp_path / "choices.jsonl", choices), "texts": written(tmp_path / "texts.jsonl", texts)}
    common = {"dataset_path": "json", "test_split": "test"}
    nodes = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, node in nodes.items():
        about = {"task": f"local_{name}", "dataset_kwargs": {"data_files": {"test": files[name]}}, **common, **node}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(about))
    export_folder(find(tmp_path / "run"), tmp_path / "out")

    theirs = {}
    for task, starts in (("local_choices", True), ("local_texts", False)):  # texts have a first token of theirs anyway
        theirs |= lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(tmp_path / "out"), "dtype": "float32", "add_bos_token": starts},
            tasks=[task],
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )["results"]
    names = {"choices": "multiple_choice", "texts": "perplexity"}
    mine = {
        name: evaluate(tmp_path / "run", [f"data.path={files[name]}"], task_from(CONF / "data" / "tasks", task)).scores
        for name, task in names.items()
    }
    found = mine["choices"]
    assert found["accuracy"].value == pytest.approx(100 * theirs["local_choices"]["acc,none"])
    assert found["accuracy_norm"].value == pytest.approx(100 * theirs["local_choices"]["acc_norm,none"])
    for name in ("word_perplexity", "bits_per_byte"):
        assert mine["texts"][name].value == pytest.approx(theirs["local_texts"][f"{name},none"], rel=1e-4)
