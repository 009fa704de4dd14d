"""Optuna as Hydra's sweeper: what it draws, what it finds, and that interruptions and company change nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from llm.config import ConfigError
from llm.lock import locked
from llm.study import Pruning, Reports, opened
from llm.sweep.sampler import sampler
from llm.sweep.search import Optuna, _is_left
from llm.sweep.space import Space, space
from tests.sweep.conftest import Start, ran, rows
from tests.sweep.fake import OPTIMUM

Sweep = Callable[..., tuple[int, str]]
LR = "optimizer.lr=tag(log, interval(1e-5, 1))"
SEARCH = ("hydra/sweeper=optuna", "run_name=a", LR, "hydra.sweeper.n_startup_trials=4", "hydra.sweeper.seed=3")


def of(*overrides: str) -> Space:
    return space(OverridesParser.create().parse_overrides(list(overrides)))


def study(path: str = "runs/a/study.journal", name: str = "a") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=opened(path))


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optimizer.lr=interval(1e-4, 1)", FloatDistribution(1e-4, 1.0)),
        ("optimizer.lr=tag(log, interval(1e-4, 1))", FloatDistribution(1e-4, 1.0, log=True)),
        ("model.n_layers=int(interval(1, 8))", IntDistribution(1, 8)),
        ("model.n_layers=tag(log, int(interval(1, 8)))", IntDistribution(1, 8, log=True)),
        ("model.dim=range(32, 129, 32)", IntDistribution(32, 128, step=32)),
        ("model.dropout=range(0.0, 0.31, 0.1)", FloatDistribution(0.0, 0.3, step=0.1)),
        ("seed=range(3, 0, -1)", CategoricalDistribution([3, 2, 1])),
        ("seed=range(0, 1)", CategoricalDistribution([0])),
        ("model=small,large", CategoricalDistribution(["small", "large"])),
        ("+data.note=choice('a b', c)", CategoricalDistribution(["a\\ b", "c"])),
    ],
)
def test_what_is_drawn_from(override: str, wanted: optuna.distributions.BaseDistribution) -> None:
    found = of(override, "trainer.max_steps=5")
    key = override.partition("=")[0]
    assert found.distributions() == {key: wanted}
    assert found.overrides({key: "x"}) == ["trainer.max_steps=5", f"{key}=x"]


def test_a_grid_is_in_the_order_of_hydras_own() -> None:
    found = of("seed=range(2)", "model=small,large")
    assert found.grid() == [{"seed": s, "model": m} for s in (0, 1) for m in ("small", "large")]
    with pytest.raises(ConfigError, match=r"optimizer.lr: interval\(0,1\) - sampler=grid goes through values"):
        of("seed=1,2", "optimizer.lr=interval(0,1)").grid()


def test_what_nothing_can_be_drawn_from() -> None:
    with pytest.raises(ConfigError, match="hydra/sweeper: optuna - no key has several values or an interval"):
        of("seed=1")
    with pytest.raises(ConfigError) as refused:
        of("seed=range(3,3)", "optimizer.lr=interval(2,1)").distributions()
    assert refused.value.mistakes[0] == "seed: range(3,3) - has no values"
    assert refused.value.mistakes[1].startswith("optimizer.lr: interval(2,1) - ")


def test_twelve_jobs_find_a_planted_optimum(sweep: Sweep) -> None:
    """To a quarter of a decade out of five; and what comes later is nearer, which drawing at random is not."""
    code, said = sweep(*SEARCH, "hydra.sweeper.n_trials=12")
    assert code == 0, said
    rates = [trial.params["optimizer.lr"] for trial in study().get_trials()]
    distances = [abs(math.log10(rate) - math.log10(OPTIMUM)) for rate in rates]
    assert min(distances) < 0.25
    assert sum(distances[6:]) < sum(distances[:6]) / 2
    best = min(range(12), key=lambda number: distances[number])
    assert f"12 jobs: 12 finished; best: job {best}, val/loss {distances[best] ** 2:.6g}" in said
    assert study().best_trial.number == best
    assert [row["job"] for row in ran()] == [str(number) for number in range(12)]
    code, more = sweep(*SEARCH, "hydra.sweeper.n_trials=13")
    assert code == 0
    assert len(ran()) == 13, "what is finished counts"
    assert rows(more)[:12] == rows(said)
    code, said = sweep(*SEARCH, "hydra.sweeper.direction=maximize", "hydra.launcher.metric=steps")
    assert code == 64
    assert "runs/a/study.journal: metric=steps direction=maximize - study a has metric=val/loss direction=min" in said
    assert "go on with the same command, or give another run_name" in said


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])
def test_a_draw_follows_from_what_was_there_before(name: Any) -> None:
    """A study that is opened anew for each draw draws what one that goes on does; with another seed something else."""
    space = {"lr": FloatDistribution(1e-5, 1, log=True), "wd": FloatDistribution(0, 1)}

    def drawn(seed: int, opened_anew: bool) -> list[dict[str, float]]:
        storage = optuna.storages.InMemoryStorage()
        found = optuna.create_study(storage=storage, study_name="s")
        for number in range(8):
            if opened_anew:
                found = optuna.load_study(storage=storage, study_name="s")
                random.seed(number)
            found.sampler = sampler(name, seed, number, 3, [])
            trial = found.ask(space)
            found.tell(trial, (math.log10(trial.params["lr"]) + 3) ** 2)
        return [trial.params for trial in found.get_trials()]

    assert drawn(0, opened_anew=True) == drawn(0, opened_anew=False)
    assert drawn(1, opened_anew=False) != drawn(0, opened_anew=False)


def test_killed_and_gone_on_with(start: Start, sweep: Sweep) -> None:
    """The same table as that of a sweep that was left alone; a trial that was at work is run again, one that failed is
    not, and nothing else is."""
    batch = ("hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "seed=choice(1,13,15)", *SEARCH[:1], *SEARCH[2:])
    process = start(*batch, "run_name=killed")
    _until(lambda: any("ready" in log.read_text() for log in Path("runs/killed").glob("log-*.txt")))
    process.kill()
    process.wait()
    for n in range(6):
        for name in ("killed", "alone"):
            Path(f"runs/{name}/{n}").mkdir(parents=True, exist_ok=True)
            Path(f"runs/{name}/{n}/saved").touch()
    before = len(ran())
    code, said = sweep(*batch, "run_name=killed")
    _, alone = sweep(*batch, "run_name=alone")
    assert code == 1
    assert [row[:4] for row in rows(said)] == [row[:4] for row in rows(alone)]
    assert {row[1] for row in rows(said)} == {"1", "13", "15"}, "or the test tells nothing"
    assert not [t for t in study("runs/killed/study.journal", "killed").get_trials() if not t.state.is_finished()]
    again = [row["job"] for row in ran()[before:] if "run_name=killed" in str(row["words"])]
    assert len(again) == len(set(again)), "each once"


def test_two_processes_share_a_study(start: Start) -> None:
    """Each number is one job's, and each job is run once."""
    processes = [start(*SEARCH, "hydra.sweeper.n_trials=8") for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    numbers = [int(row["job"]) for row in ran()]
    assert sorted(numbers) == list(range(len(numbers)))
    assert 8 <= len(numbers) <= 9, "both may draw the last"
    assert all(trial.state.name == "COMPLETE" for trial in study().get_trials())


def test_a_trial_belongs_to_who_drew_it_while_that_lives(tmp_path: Path) -> None:
    found = optuna.create_study()
    found.enqueue_trial({}, user_attrs={"process": str(tmp_path / "me")})
    trial = found.get_trials()[found.ask().number]
    with locked(tmp_path / "me"):
        assert not _is_left(trial)
    assert _is_left(trial)


def test_every_combination_once_and_pruned_and_failed_trials(sweep: Sweep) -> None:
    """In a grid; a pruned trial is none that failed."""
    told = ("hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "hydra.sweeper.pruner=median", "run_name=a")
    code, said = sweep(*told, "seed=1,13,16", "optimizer.weight_decay=0.1,0.2", "hydra.launcher.n_jobs=3")
    assert code == 1
    pairs = [(row[1], row[2]) for row in rows(said)]
    assert pairs == [(seed, decay) for seed in ("1", "13", "16") for decay in ("0.1", "0.2")]
    assert [trial.state.name for trial in study().get_trials()] == ["COMPLETE"] * 2 + ["FAIL"] * 2 + ["PRUNED"] * 2
    words = {row["job"]: row["words"] for row in ran()}["4"]
    callback = "{_target_:llm.callback.Prune,storage:runs/a/study.journal,study:a,trial:4}"
    assert f"+callback.prune={callback}" in words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("hydra/launcher=basic", "hydra.sweeper.n_jobs=1"),
            "hydra/launcher: BasicLauncher - hydra/sweeper=optuna needs",
        ),
        (("optimizer.lr=1e-3",), "hydra/sweeper: optuna - no key has several values or an interval - give some"),
        (
            ("optimizer.lr=interval(0,1)", "hydra.sweeper.sampler=grid"),
            "optimizer.lr: interval(0,1) - sampler=grid goes",
        ),
    ],
)
def test_refused_before_anything_is_written(sweep: Sweep, words: tuple[str, ...], told: str) -> None:
    code, said = sweep(*SEARCH[:2], *(() if "optimizer.lr" in str(words) else (LR,)), *words)
    assert code == 64, said
    assert told in said
    assert not Path("runs").exists()


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llm.sweep.search.find_spec", lambda name: None if name == "cmaes" else name)
    with pytest.raises(SystemExit) as left:
        Optuna(sampler="cmaes").sweep([])
    assert left.value.code == 64
    told = "hydra/sweeper: optuna - cmaes is not installed - pip install -e '.[sweep]'"
    assert told in capfd.readouterr().err


def test_reports_are_told_once_and_an_answer_stays(tmp_path: Path) -> None:
    """Of a job that was preempted after it was told to end, and measures steps again."""
    path = tmp_path / "journal"
    found = optuna.create_study(study_name="s", storage=opened(path))
    Pruning("val/loss", "median", 0, 1, 4).write(found)
    for value in (1.0, 1.1, 1.2):
        good = found.ask()
        good.report(value, 5)
        found.tell(good, value)
    bad = found.ask()
    reports = Reports(path, "s", bad.number)
    reports.report(5, 9.0)
    assert reports.hopeless(5)
    again = Reports(path, "s", bad.number)
    again.report(5, 0.0)
    assert found.get_trials()[bad.number].intermediate_values == {5: 9.0}
    again.report(10, 0.0)
    assert again.hopeless(10), "what was said is not taken back"
    fine = Reports(path, "s", found.ask().number)
    fine.report(5, 0.9)
    assert not fine.hopeless(5)


def test_asha_keeps_one_of_so_many(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    found = optuna.create_study(study_name="s", storage=opened(path))
    Pruning("val/loss", "asha", 0, 10, 2).write(found)
    told = []
    for value in (4.0, 3.0, 2.0, 5.0):
        reports = Reports(path, "s", found.ask().number)
        reports.report(9, value)
        assert not reports.hopeless(9), "before the first rung"
        reports.report(10, value)
        told.append(reports.hopeless(10))
    assert told == [False, False, False, True]


def _until(true: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
