"""A trained model on rows that it has not seen, by the task's own metric: `python -m llm evaluate RUN`."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from llm.build import built
from llm.checkpoint import find, load
from llm.config import ConfigError
from llm.data import Classify, DataError, ExtractSpan, Supervised, Tag, TextData
from llm.data.example import IGNORED, Fields
from llm.data.supervised import BadRowError, Read
from llm.generate import answer
from llm.generate.classify import extract, label_scores
from llm.metric import METRICS, Score
from llm.model import Transformer
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How texts are generated: settings of `llm.generate.answer`."""

    max_new_tokens: int = 128
    batch_size: int = 32
    n_beams: int = 1
    alpha: float = 0.6
    temperature: float = 0.0


@dataclass
class Evaluation:
    """What came of it: scores by name, and every row's `id`, `prediction` and `references`."""

    scores: dict[str, Score] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        """Predictions as JSON lines, and the scores beside them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows), encoding="utf-8")
        scores = {name: vars(score) for name, score in self.scores.items()}
        about = {"scores": scores, "n_rows": len(self.rows), "skipped": dict(self.skipped)}
        path.with_suffix(".scores.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def evaluate(
    run: str | Path,
    overrides: Sequence[str] = (),
    metrics: Sequence[str] = (),
    decoding: Decoding | None = None,
    *,
    n_bootstrap: int = 0,
    limit: int | None = None,
) -> Evaluation:
    """Score a run or step directory on the held-out rows of its data, or on those that `overrides` of `data.*` name.

    Args:
        metrics: names in llm.metric.METRICS; none: those of the task.
        n_bootstrap: how often the rows are drawn again for intervals; 0: no intervals.
        limit: so many rows at most.

    Raises:
        ConfigError: for a key that is none, a metric that is none, and data without a supervised task.
        DataError, CheckpointError: see there.
    """
    step = find(run)
    cfg = _overridden(OmegaConf.load(step / "config.yaml"), overrides)
    data: TextData = built(cfg.data)
    name, task = _task(data)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ConfigError([f"--metric: {unknown[0]} - there is none of this name - take {', '.join(METRICS)}"])
    if not (metrics or task.metrics):
        raise ConfigError(
            [f"data.tasks.{name}: is measured by val/accuracy - train.py stage=validate resume={run} says it"]
        )
    model, tokenizer = load(step)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    task.check(name, tokenizer)
    found = Evaluation()
    reads: list[Read] = []
    for row, where in data.held_out():
        if limit is not None and len(reads) >= limit:
            break
        try:
            reads.append(task.read(row, where))
        except BadRowError as error:
            if task.bad_rows == "refuse":
                raise
            found.skipped[error.rule] += 1
            continue
        found.rows.append({"id": where})
    if not reads:
        raise DataError(f"nothing to evaluate on: no held-out row is an example of data.tasks.{name}")
    predictions = _predicted(model, tokenizer, task, reads, decoding or Decoding())
    references = [task.references(read) for read in reads]
    for told, prediction, good in zip(found.rows, predictions, references, strict=True):
        told |= {"prediction": prediction, "references": good}
    for metric in metrics or task.metrics:
        found.scores |= METRICS[metric](predictions, references, n_bootstrap)
    return found


def table(found: Evaluation) -> str:
    """One line for each score."""
    lines = []
    for name, score in found.scores.items():
        interval = "" if score.low is None else f"  [{score.low:.2f}, {score.high:.2f}]"
        lines.append(f"{name:<12}{score.value:8.2f}{interval}{'  ' + score.signature if score.signature else ''}")
    skipped = "".join(f", {n:,} left out: {rule}" for rule, n in found.skipped.items())
    return "\n".join([*lines, f"{len(found.rows):,} rows{skipped}"])


def _predicted(
    model: Transformer, tokenizer: Tokenizer, task: Supervised, reads: list[Read], decoding: Decoding
) -> list[str]:
    if isinstance(task, Classify):
        shown = [task.shown(read, model.config.max_length, tokenizer) for read in reads]
        scores = label_scores(model, shown, tokenizer.pad_id, decoding.batch_size)
        return [task.labels[int(of_tokens[0].argmax())] for of_tokens in scores]
    if isinstance(task, Tag):
        examples = [task.shown(read, model.config.max_length, tokenizer) for read in reads]
        scores = label_scores(model, examples, tokenizer.pad_id, decoding.batch_size)
        return [_tagged(task, example, found) for example, found in zip(examples, scores, strict=True)]
    if isinstance(task, ExtractSpan):
        return extract(model, tokenizer, task, reads, decoding.batch_size)
    prompts = [task.prompt_of(read, tokenizer) for read in reads]
    return answer(model, tokenizer, prompts, **vars(decoding))


def _tagged(task: Tag, example: Fields, scores: Tensor) -> str:
    """The label of each word that there was room for."""
    first = torch.from_numpy(example["labels"] != IGNORED)
    return " ".join(task.labels[number] for number in scores[first].argmax(-1).tolist())


def _task(data: TextData) -> tuple[str, Supervised]:
    found = [(name, task) for name, task in data.tasks.items() if isinstance(task, Supervised)]
    if len(found) != 1:
        raise ConfigError(
            [f"data.tasks: {', '.join(data.tasks)} - one task with answers is evaluated at a time - name one"]
        )
    return found[0]


def _overridden(cfg: Any, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with other keys of `data`."""
    mistakes = [
        f"{override}: is no key of data - give data.…=VALUE; the model is that of the checkpoint"
        for override in overrides
        if not override.startswith("data.") or "=" not in override
    ]
    if mistakes:
        raise ConfigError(mistakes)
    try:
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{' '.join(overrides)}: {str(error).splitlines()[0]}"]) from error
    assert isinstance(merged, DictConfig)
    return merged
