"""What a run leaves behind when it is done: `summary.json`, `loss.png`, and a table for the person who waited."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llm import attempts
from llm.callback.metrics import metrics_of
from llm.callback.plot import plot_run
from llm.callback.prune import Prune
from llm.callback.record import Record, Row
from llm.callback.sample import Sample
from llm.code import commit
from llm.metric import gzip_bits_per_byte, unigram_bits_per_byte, wilson_interval
from llm.objective import Objective

_BASELINE_CHARACTERS = 20_000_000
_PACKAGES = ("torch", "lightning", "hydra-core", "datasets", "tokenizers", "wandb")
_CONTENTS = {
    "config.yaml": "every setting, resolved",
    "metrics.jsonl": "one row a flush (also metrics.csv)",
    "loss.png": "the curves",
    "samples.txt": "generated text",
    "summary.json": "this table",
    "checkpoints": "newest weights and state",
    "tokenizer": "opens with transformers too",
    "tensorboard": "tensorboard --logdir RUN",
    "wandb": "offline run: wandb sync RUN/wandb/offline-run-*",
}


class Summary(Callback):
    """Write and print how the run ended, beside baselines that need no model: the frequencies of the held-out tokens
    and, of a model that predicts whole texts, of their bytes, and gzip."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the wall clock."""
        self._start_s = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, draw and print."""
        assert isinstance(pl_module, Objective)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: L.Trainer, objective: Objective) -> None:
        run_dir = Path(trainer.default_root_dir)
        metrics = metrics_of(trainer)
        rows = Record.of(trainer).rows()
        validated = {name: _last(rows, name) for name in _validation_names(rows)}
        baselines = _baselines(trainer, predicted=validated.get("val/bits_per_byte") is not None)
        if objective.unigram_loss is not None:
            baselines["unigram/loss"] = objective.unigram_loss
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            "tokens": metrics.tokens if metrics else None,
            "wall_s": round(time.monotonic() - self._start_s, 3),
            "tokens_per_s": metrics.tokens / metrics.train_s if metrics and metrics.train_s else None,
            "parameters": objective.network.n_parameters(),
            "train/loss": _last(rows, "train/loss"),
            **validated,
            "baselines": baselines,
            **_pruned(trainer),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "interruptions": attempts.interruptions(run_dir),
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_run(rows, baselines, run_dir / "loss.png")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        samples = next((callback.texts for callback in callbacks if isinstance(callback, Sample)), [])
        _print(summary, samples, run_dir)


def _pruned(trainer: L.Trainer) -> dict[str, int]:
    """At which step a sweep ended the run, if it did."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    step = next((callback.pruned_at for callback in callbacks if isinstance(callback, Prune)), None)
    return {} if step is None else {"pruned": step}


def _last(rows: list[Row], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _validation_names(rows: list[Row]) -> list[str]:
    """`val/loss`, and all else that was validated."""
    found = (name for row in rows for name in row if name.startswith("val/"))
    return list(dict.fromkeys(["val/loss", *found]))


def _baselines(trainer: L.Trainer, *, predicted: bool) -> dict[str, float]:
    """Of the first megabytes of held-out text, if that was predicted whole: gzip -9 takes a second for 10 of them, and
    the devices wait."""
    if not predicted:
        return {}
    texts: list[str] = []
    n_characters = 0
    for text in trainer.datamodule.val_texts():  # type: ignore[attr-defined]
        texts.append(text)
        n_characters += len(text)
        if n_characters >= _BASELINE_CHARACTERS:
            break
    if not texts:
        return {}
    return {
        "unigram/bits_per_byte": unigram_bits_per_byte(texts),
        "gzip/bits_per_byte": gzip_bits_per_byte(texts),
    }


def _print(summary: dict[str, Any], samples: list[str], run_dir: Path) -> None:
    """The result beside the baselines, the samples, and where everything lies."""
    console = Console()
    for number, text in enumerate(samples, 1):
        console.print(Panel(Text(text), title=f"sample {number}", border_style="dim"))
    console.print(_headline(summary), highlight=False)
    if summary["val/loss"] is not None:
        console.print(_table(summary))
    for line in _findings(summary):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Everything lies in {run_dir.resolve()}:", highlight=False, soft_wrap=True)
    for name, what in _CONTENTS.items():
        if (run_dir / name).exists():
            console.print(f"  {name:<14}{what}", highlight=False, soft_wrap=True)


def _table(summary: dict[str, Any]) -> Table:
    """The model below what it has to beat, in each unit that the run has."""
    units = {"loss": f"nats per {_unit(summary)}", "bits_per_byte": "bits per byte"}
    units = {unit: title for unit, title in units.items() if f"val/{unit}" in summary}
    table = Table("held-out text", *units.values())
    for name in dict.fromkeys(key.partition("/")[0] for key in summary["baselines"]):
        table.add_row(name, *(_number(summary["baselines"].get(f"{name}/{unit}"), ".3f") for unit in units))
    own = (f"[bold]{_number(summary[f'val/{unit}'], '.3f')}[/bold]" for unit in units)
    table.add_row("[bold]this model[/bold]", *own)
    return table


def _findings(summary: dict[str, Any]) -> list[str]:
    """What else was validated: the loss of each task, how often answers are right, how well pairs are told apart."""
    prefix = "val/loss/"
    lines = [
        f"{name.removeprefix(prefix)}: {_number(value, '.3f')} nats per {_unit(summary)}"
        for name, value in summary.items()
        if name.startswith(prefix)
    ]
    told = {"accuracy": ".1%", "macro_f1": ".3f", "mcc": ".3f", "margin": ".3f"}
    found = [
        f"{name} {_number(summary[f'val/{name}'], form)}" for name, form in told.items() if f"val/{name}" in summary
    ]
    lines += [", ".join(found)] if found else []
    accuracy, n_pairs = summary.get("val/next_sentence_accuracy"), summary.get("val/next_sentence_pairs")
    if accuracy is not None and n_pairs:
        low, high = wilson_interval(accuracy, n_pairs)
        lines.append(f"next sentence: {accuracy:.1%} of {n_pairs:,.0f} pairs right (95 %: {low:.1%} to {high:.1%})")
    return lines


def _unit(summary: dict[str, Any]) -> str:
    """What a loss is the mean over."""
    return "answer" if "val/accuracy" in summary else "token"


def _headline(summary: dict[str, Any]) -> str:
    return (
        f"{summary['parameters']:,} parameters, {summary['steps']:,} steps, {_number(summary['tokens'], ',')} tokens, "
        f"{summary['wall_s']:.0f} s, {_number(summary['tokens_per_s'], ',.0f')} tokens/s, "
        f"validation loss {_number(summary['val/loss'], '.4f')}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
