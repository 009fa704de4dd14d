"""`python -m llm audit RUN`: what the ledger of a run proves, and what its steps were trained on."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from llm import ledger
from llm.checkpoint import read_state, steps
from llm.config import check as check_configuration
from llm.data import DataError, TextData
from llm.ledger import Account


def check(run_dir: str | Path) -> tuple[str, bool]:
    """A report, and whether everything is as it must be: seals, steps, batches, passes over the data, checkpoints.

    Raises:
        DataError: if there is no ledger.
    """
    account = _account(run_dir)
    mistakes = [*account.mistakes, *ledger.passes(account), *_checkpoints(run_dir, account), *_data(account)]
    samples = sum(len(step["samples"]) for step in account.steps.values())
    starts = [event for event in account.events if event["event"] != "rollback"]
    sizes = ", ".join(str(event["world_size"]) for event in starts)
    lines = [
        f"{run_dir}: {len(account.steps)} steps, {samples} samples",
        f"  {len(starts)} starts, on {sizes} processes; {account.n_undone} steps done again",
        *(f"  {line}" for line in _passes(account)),
        *(f"  {line}" for line in _without_update(account)),
        *(f"  wrong: {mistake}" for mistake in mistakes),
        "  every seal holds, no step is missing, no sample was lost or used twice" if not mistakes else "  not sound",
    ]
    return "\n".join(lines), not mistakes


def show_step(run_dir: str | Path, step: int) -> str:
    """The loss of a step, and the texts that it was trained on.

    Raises:
        DataError: if there is no such step, or the data is not that of the run.
    """
    account, data = _account(run_dir), _data_of(run_dir)
    if step not in account.steps:
        raise DataError(f"{run_dir}: step {step} is not in the ledger, which has 1 to {max(account.steps, default=0)}")
    line = account.steps[step]
    told = f", no update: {line['skipped']}" if "skipped" in line else ""
    found = [f"step {step}, batch {line['batch']}, loss {_loss(line):.4f}{told}"]
    for sample in line["samples"]:
        name, texts = data.texts_of(sample)
        found.append(f"==== sample {sample}, {name}")
        found += texts
    return "\n".join(found)


def show_window(run_dir: str | Path, first: int, last: int) -> str:
    """Which sources steps `first` to `last` were of, beside their share in all steps; the most unusual first.

    Raises:
        DataError: if none of the steps is in the ledger.
    """
    account = _account(run_dir)
    window = [account.steps[step] for step in range(first, last + 1) if step in account.steps]
    if not window:
        raise DataError(f"{run_dir}: none of the steps {first} to {last} is in the ledger")
    here = Counter(_source(account, sample) for line in window for sample in line["samples"])
    anywhere = Counter(_source(account, sample) for line in account.steps.values() for sample in line["samples"])
    loss = sum(_loss(line) for line in window) / len(window)
    rows = []
    for name in anywhere:
        share, usual = here[name] / here.total(), anywhere[name] / anywhere.total()
        rows.append((share / usual, f"{name:<30}{here[name]:>10}{share:>10.1%}{usual:>10.1%}"))
    head = f"{'source/task':<30}{'samples':>10}{'share':>10}{'in all':>10}"
    title = f"steps {window[0]['step']} to {window[-1]['step']}, mean loss {loss:.4f}"
    return "\n".join([title, head, *(text for _, text in sorted(rows, reverse=True))])


def _account(run_dir: str | Path) -> Account:
    try:
        return ledger.read(run_dir)
    except FileNotFoundError:
        raise DataError(
            f"{run_dir}: holds no {ledger.NAME}; give the directory of a run with callback.ledger"
        ) from None


def _data_of(run_dir: str | Path) -> TextData:
    """The data of the run's configuration, prepared. The file may come from anywhere: it is checked first."""
    cfg = OmegaConf.load(Path(run_dir) / "config.yaml")
    assert isinstance(cfg, DictConfig)
    for again in ("callbacks", "logger"):  # resolved, their groups stand here a second time
        cfg.trainer.pop(again)
    check_configuration(cfg)
    data = instantiate(cfg.data, _convert_="all")
    data.prepare()
    return data


def _checkpoints(run_dir: str | Path, account: Account) -> list[str]:
    """Checkpoints that know of a place that the ledger has not: lines at its end are lost."""
    lines = []
    for step in steps(run_dir):
        chain = read_state(step).get("ledger")
        if chain is not None and chain not in account.chains:
            lines.append(f"{step.name} knows of a line with chain {chain}, which is not here")
    return lines


def _data(account: Account) -> list[str]:
    """Whether all starts had the same data, and went on from what is here."""
    lines = []
    for event in account.events[1:]:
        if event["data"] != account.events[0]["data"]:
            lines.append(f"the {event['event']} at step {event['step']} had other data than the first start")
        if event.get("after") is not None and event["after"] not in account.chains:
            lines.append(f"the {event['event']} at step {event['step']} goes on from a line that is not here")
    return lines


def _passes(account: Account) -> list[str]:
    counts = Counter(_source(account, sample) for line in account.steps.values() for sample in line["samples"])
    return [f"{name}: {counts[name]} of {n} rows, {counts[name] / n:.2f} passes" for name, n in account.rows.items()]


def _without_update(account: Account) -> list[str]:
    """Where the run left batches out, and why."""
    lines = []
    for event in account.events:
        if event["event"] == "rollback":
            first, last = event["left_out"]
            found = f"at step {event['found']} {event['cause']}"
            lines.append(f"{found}: back to step {event['step']}, without batches {first} to {last}")
    skipped = {step: line["skipped"] for step, line in sorted(account.steps.items()) if "skipped" in line}
    return lines + [f"step {step} made no update: {cause}" for step, cause in skipped.items()]


def _loss(line: ledger.Line) -> float:
    """Of a step; a step that was left out has none."""
    return math.nan if line["loss"] is None else float.fromhex(line["loss"])


def _source(account: Account, sample: int) -> str:
    for name, n_rows in account.rows.items():
        if sample < n_rows:
            return name
        sample -= n_rows
    return "of no source"
