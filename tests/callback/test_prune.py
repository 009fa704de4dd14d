"""A job that its study gives up ends at a validation, on all processes, as a run ends."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import optuna
import pytest

from llm.checkpoint import newest
from llm.run import run
from llm.signals import PreemptedError
from llm.study import Pruning, opened
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed


def study(path: Path, losses: tuple[float, ...] = (0.1, 0.2), metric: str = "val/loss") -> optuna.Study:
    """Trials that ended, measured at step 3, and one that is open."""
    found = optuna.create_study(study_name="s", storage=opened(path))
    Pruning(metric, "median", 0, 1, 4).write(found)
    for loss in losses:
        trial = found.ask()
        trial.report(loss, 3)
        found.tell(trial, loss)
    found.ask()
    return found


def prune(path: Path, trial: int = 2) -> str:
    return f"+callback.prune={{_target_: llm.callback.Prune, storage: {path}, study: s, trial: {trial}}}"


def end(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "exit.json").read_text())
    return found


def test_a_hopeless_job_ends_on_all_ranks(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """With exit code 0, a checkpoint, one report and a summary that says so."""
    found, run_dir = study(tmp_path / "journal"), tmp_path / "run"
    places = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={run_dir}"]
    two = ["strategy=ddp", "trainer.devices=2", "data.micro_batch_size=2", prune(tmp_path / "journal")]
    assert [outcome.step for outcome in run_on_ranks(run_composed, 2, [*places, *two])] == [3, 3]
    assert end(run_dir) == {"code": 0, "cause": "stopped early", "step": 3, "max_steps": 6}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["pruned"], summary["steps"]) == (3, 3)
    assert newest(run_dir).name == "step-00000003"
    (reported,) = found.get_trials()[2].intermediate_values.items()
    assert reported == (3, pytest.approx(summary["val/loss"]))


def test_a_good_job_goes_on_and_reports_once_whatever_interrupts_it(
    compose_run: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Preempted, and then without its checkpoint, it measures steps again, and reports none again."""
    found, run_dir = study(tmp_path / "journal", (90.0, 95.0)), tmp_path / "run"
    told = "+callback.rehearsal={_target_: llm.callback.Rehearsal, fault: SIGUSR1, step: 5}"
    with pytest.raises(PreemptedError):
        run(compose_run(prune(tmp_path / "journal"), told))
    before = found.get_trials()[2].intermediate_values
    assert list(before) == [3]
    shutil.rmtree(run_dir / "checkpoints")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*already reported.*")  # which would reach the log as a report that failed
        run(compose_run(prune(tmp_path / "journal")))
    assert "was not told" not in caplog.text
    assert found.get_trials()[2].intermediate_values[3] == before[3]
    assert sorted(found.get_trials()[2].intermediate_values) == [3, 6]
    assert "pruned" not in json.loads((run_dir / "summary.json").read_text())
    assert end(run_dir)["cause"] == "finished"


def test_a_study_that_cannot_be_told_costs_no_run(
    compose_run: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study(tmp_path / "journal", metric="val/blue")
    with caplog.at_level(logging.WARNING):
        run(compose_run(prune(tmp_path / "nowhere" / "journal"), "trainer.max_steps=3"))
        run(compose_run(prune(tmp_path / "journal"), f"run_dir={tmp_path / 'b'}", "trainer.max_steps=3"))
    assert "nowhere/journal was not told of step 3" in caplog.text
    assert "callback.prune: val/blue was not measured, there is val/loss" in caplog.text
    assert end(tmp_path / "run")["cause"] == end(tmp_path / "b")["cause"] == "finished"
