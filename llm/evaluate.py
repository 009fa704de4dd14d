"""A trained model on rows that it has not seen, by the task's own metric: `python -m llm evaluate RUN`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from llm.build import built
from llm.checkpoint import find, load
from llm.config import ConfigError, check
from llm.data import Classify, DataError, ExtractSpan, Supervised, Tag, TextData, WriteCode
from llm.data.example import IGNORED, Fields
from llm.data.likelihood import Likelihoods, Perplexity
from llm.data.supervised import Read, examples
from llm.generate import answer
from llm.generate.classify import extract, label_scores
from llm.generate.score import likelihoods
from llm.metric import METRICS, Score, check_installed, mean, perplexities, perplexity
from llm.metric.code import verdicts
from llm.model import Transformer
from llm.tokenizer import Tokenizer


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
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        # Half of a surrogate pair cannot be encoded; this writes the escape that JSON has for it.
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")
        scores = {name: vars(score) for name, score in self.scores.items()}
        about = {"scores": scores, "n_rows": len(self.rows), "skipped": dict(self.skipped)}
        path.with_suffix(".scores.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def evaluate(
    run: str | Path,
    overrides: Sequence[str] = (),
    task_node: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = (),
    decoding: Decoding | None = None,
    *,
    n_bootstrap: int = 0,
    limit: int | None = None,
    run_programs: bool = False,
    settings: Callable[[Path], DictConfig] | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Score a run or step directory on the held-out rows of its data, or on all of the files that `data.path=…` among
    the `overrides` names. Whatever can be refused is refused before the model is loaded: answering takes hours.

    Args:
        task_node: what is done with the rows, as a file of conf/data/tasks has it; None: what the run was trained for.
        metrics: names in llm.metric.METRICS; none: those of the task.
        n_bootstrap: how often the rows are drawn again for intervals; 0: no intervals.
        limit: so many rows at most.
        run_programs: whether programs that the model has written may be run, with limits, as this process's user.
        settings: composes those of a run for a step directory that has none: weights that were imported.
        out: where `Evaluation.write` is to put what was found; None: nowhere.

    Raises:
        ConfigError: for a key that is none, a metric that is none, data without a supervised task, and an `out` that
            cannot be written.
        DataError, CheckpointError: see there.
    """
    step = find(run)
    cfg = _overridden(_settings(step, settings, task_node, overrides), task_node, overrides)
    data: TextData = built(cfg.data)
    name, task = _task(data)
    metrics = _metrics(name, task, metrics, run)
    if out is not None:
        _check_out(out)
    if isinstance(task, WriteCode) and not run_programs:
        raise ConfigError([f"data.tasks.{name}: runs programs that a model has written, as you - add --run-programs"])
    model, tokenizer = load(step)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    task.check(name, tokenizer)
    found = Evaluation()
    reads = _read(data, task, found, limit, everything=_names_files(overrides))
    told, found.scores = _told(model, tokenizer, task, reads, decoding or Decoding(), n_bootstrap)
    for row, more, read in zip(found.rows, told, reads, strict=True):
        row |= {**more, "references": task.references(read)}
    if out is not None:
        found.write(out)  # whatever becomes of the scores
    for metric in metrics:
        predictions, references = ([row[key] for row in found.rows] for key in ("prediction", "references"))
        found.scores |= METRICS[metric](predictions, references, n_bootstrap)
    if out is not None:
        found.write(out)
    return found


def _metrics(name: str, task: Supervised, given: Sequence[str], run: str | Path) -> list[str]:
    """Those by which the answers are compared with their references; none for a task that has scores of its own."""
    unknown = [metric for metric in given if metric not in METRICS]
    if unknown:
        raise ConfigError([f"--metric: {unknown[0]} - there is none of this name - take {', '.join(METRICS)}"])
    if isinstance(task, Likelihoods | Perplexity | WriteCode):
        if given:
            raise ConfigError([f"--metric: {given[0]} - data.tasks.{name} has scores of its own - leave it out"])
        return []
    if not (given or task.metrics):
        raise ConfigError([f"data.tasks.{name}: is measured by val/accuracy - stage=validate resume={run} says it"])
    metrics = list(given or task.metrics)
    try:
        check_installed(metrics)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return metrics


def _check_out(out: Path) -> None:
    """Whether predictions can be written there, and the scores beside them."""
    if out.is_dir():
        raise ConfigError([f"--out: {out} - is a folder - name a file"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError([f"--out: {out} - one of the folders in it is a file - name another place"]) from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError([f"--out: {out} - its folder may not be written to - name another place"])


def _read(data: TextData, task: Supervised, found: Evaluation, limit: int | None, *, everything: bool) -> list[Read]:
    """What the task makes of each row; what is no example is counted, or refused."""
    kept = list(islice(examples(task, data.held_out(everything=everything), found.skipped), limit))
    if not kept:
        why = "".join(f"; {n:,} left out: {rule}" for rule, n in found.skipped.items())
        raise DataError(f"nothing to evaluate on: no row is an example of data.tasks.{', '.join(data.tasks)}{why}")
    found.rows += [{"id": where} for _, where in kept]
    return [read for read, _ in kept]


def task_from(folder: Path, name: str) -> dict[str, Any]:
    """The task of a file of conf/data/tasks. Raises ConfigError if there is none of this name."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError([f"task={name} - there is none of this name - take {known}"])
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def table(found: Evaluation) -> str:
    """One line for each score."""
    lines, width = [], max(12, *(len(name) + 1 for name in found.scores), 0)
    for name, score in found.scores.items():
        interval = "" if score.low is None else f"  [{score.low:.2f}, {score.high:.2f}]"
        lines.append(f"{name:<{width}}{score.value:8.2f}{interval}{'  ' + score.signature if score.signature else ''}")
    skipped = "".join(f", {n:,} left out: {rule}" for rule, n in found.skipped.items())
    return "\n".join([*lines, f"{len(found.rows):,} rows{skipped}"])


def _told(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Supervised,
    reads: list[Read],
    decoding: Decoding,
    n_bootstrap: int,
) -> tuple[list[dict[str, Any]], dict[str, Score]]:
    """What the model says of each row, and the scores that the task has of its own."""
    if isinstance(task, Likelihoods):
        return _likely(model, tokenizer, task, reads, decoding.batch_size, n_bootstrap)
    if isinstance(task, Perplexity):
        return _perplexity(model, tokenizer, task, reads, decoding.batch_size, n_bootstrap)
    predictions = _predicted(model, tokenizer, task, reads, decoding)
    if isinstance(task, WriteCode):
        return _judged(task, reads, predictions, n_bootstrap)
    return [{"prediction": text} for text in predictions], {}


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
    stop = task.stop if isinstance(task, WriteCode) else ()
    answers = answer(model, tokenizer, prompts, stop=stop, **vars(decoding))
    return answers if stop else [text.strip() for text in answers]


def _likely(
    model: Transformer, tokenizer: Tokenizer, task: Likelihoods, reads: list[Read], batch_size: int, n_bootstrap: int
) -> tuple[list[dict[str, Any]], dict[str, Score]]:
    """What is told of each row, and the scores, in per cent: `accuracy`, of the candidate with the most likely
    continuation; `accuracy_norm`, by nats for each byte of it; of a single candidate how often every token was the
    likeliest, and `perplexity` of its tokens.
    """
    texts = [candidate for read in reads for candidate in task.candidates(read)]
    contexts = tokenizer.encode_batch([context for context, _ in texts])
    ends = tokenizer.encode_batch([continuation for _, continuation in texts])
    pairs = [
        ([tokenizer.start_id, *context.tolist()], end.tolist()) for context, end in zip(contexts, ends, strict=True)
    ]
    scored = iter(likelihoods(model, pairs, tokenizer.pad_id, batch_size))
    told: list[dict[str, Any]] = []
    right: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": []}
    nats = n_tokens = 0.0
    for read in reads:
        candidates, gold = task.candidates(read), read.rest[1]
        found = [next(scored) for _ in candidates]
        nats, n_tokens = nats + found[gold].nats, n_tokens + found[gold].n_tokens
        if len(candidates) == 1:
            right["accuracy"].append(100.0 * found[0].greedy)
            told.append({"nats": found[0].nats, "prediction": found[0].greedy})
            continue
        total = [one.nats for one in found]
        by_byte = [one.nats / len(text.strip().encode()) for one, (_, text) in zip(found, candidates, strict=True)]
        right["accuracy"].append(100.0 * (total.index(min(total)) == gold))
        right["accuracy_norm"].append(100.0 * (by_byte.index(min(by_byte)) == gold))
        told.append({"nats": total, "prediction": total.index(min(total)), "gold": gold})
    scores = {name: mean(values, n_bootstrap) for name, values in right.items() if values}
    if not right["accuracy_norm"]:
        scores["perplexity"] = Score(perplexity(nats, n_tokens))
    return told, scores


def _perplexity(
    model: Transformer, tokenizer: Tokenizer, task: Perplexity, reads: list[Read], batch_size: int, n_bootstrap: int
) -> tuple[list[dict[str, Any]], dict[str, Score]]:
    """-log p of each text, and what that comes to for a token, a word and a byte."""
    texts = [read.texts[0] for read in reads]
    longest = model.config.max_length
    windows = [task.windows(ids.tolist(), tokenizer.start_id, longest) for ids in tokenizer.encode_batch(texts)]
    scored = iter(likelihoods(model, [pair for several in windows for pair in several], tokenizer.pad_id, batch_size))
    of_text = [[next(scored) for _ in several] for several in windows]
    nats = [sum(part.nats for part in parts) for parts in of_text]
    n_tokens = [sum(part.n_tokens for part in parts) for parts in of_text]
    told = [{"nats": one, "n_tokens": n} for one, n in zip(nats, n_tokens, strict=True)]
    return told, perplexities(nats, n_tokens, texts, n_bootstrap)


def _judged(
    task: WriteCode, reads: list[Read], completions: list[str], n_bootstrap: int
) -> tuple[list[dict[str, Any]], dict[str, Score]]:
    """Run every program; `pass@1` is how many do what their tests want, in per cent."""
    found = verdicts([task.program_of(read, text) for read, text in zip(reads, completions, strict=True)])
    told = [{"prediction": text, "verdict": verdict} for text, verdict in zip(completions, found, strict=True)]
    return told, {"pass@1": mean([100.0 * (verdict == "passed") for verdict in found], n_bootstrap)}


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


def _settings(
    step: Path,
    compose: Callable[[Path], DictConfig] | None,
    task_node: Mapping[str, Any] | None,
    overrides: Sequence[str],
) -> Any:
    """Those of a checkpoint; where it has its model's only, as one that was imported, with others for the rest."""
    cfg: Any = OmegaConf.load(step / "config.yaml")
    if "data" in cfg:
        return cfg
    if compose is None or task_node is None or not _names_files(overrides):
        raise ConfigError([f"{step}: was trained for no task here - give task=NAME and data.path=FILE"])
    return OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(compose(step))), {"model": cfg.model})


def _overridden(cfg: Any, task_node: Mapping[str, Any] | None, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with another task, and other keys of `data`, written as for train.py."""
    mistakes = [
        f"{override}: is no key of data - give data.…=VALUE; the model is that of the checkpoint"
        for override in overrides
        if not override.startswith("data.") or "=" not in override
    ]
    if mistakes:
        raise ConfigError(mistakes)
    assert isinstance(cfg, DictConfig)
    if task_node is not None:
        cfg.data.tasks = task_node
    if _names_files(overrides):
        cfg.data.sources = None
    try:
        for parsed in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(cfg, parsed.key_or_group, parsed.value(), merge=True)
    except (OmegaConfBaseException, OverrideParseException) as error:
        raise ConfigError([f"{' '.join(overrides)}: {str(error).splitlines()[0]}"]) from error
    # Of the run that it was, written out: of no consequence here, and perhaps not there.
    cfg.resume, cfg.callback, cfg.logger = "auto", {}, {}
    cfg.trainer.callbacks, cfg.trainer.logger = "${oc.dict.values:callback}", "${oc.dict.values:logger}"
    check(cfg)
    return cfg


def _names_files(overrides: Sequence[str]) -> bool:
    return any(override.startswith("data.path=") for override in overrides)
