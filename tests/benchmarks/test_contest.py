"""The parts of the speed benchmark that decide what is reported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, report
from benchmarks.contest import Contestant, ContestError, Outcome, Spread, compete
from benchmarks.material import apart
from benchmarks.measure import Bar, Row, measures
from benchmarks.turn import Pace

# A contestant without torch: it notes each of its steps in a file that all share.
SCRIPT = """
import sys
from benchmarks.turn import Turn
turn = Turn()
for step in range(turn.pace.n_steps):
    with open({diary!r}, "a") as diary:
        diary.write("{name} ")
    sum(range({work}))
    turn.after_step(step + {shift})
"""


def contestant(name: str, diary: Path, work: int = 1000, shift: float = 0.0, end: str = "") -> Contestant:
    script = SCRIPT.format(diary=str(diary), name=name, work=work, shift=shift) + end
    return Contestant(name, [sys.executable, "-c", script], work=[3.0] * 100)


def held(team: list[Contestant], folder: Path, pace: Pace, starts: int = 1) -> Outcome:
    cpus = sorted(os.sched_getaffinity(0))[:1]
    return compete(team, pace, folder / "contest", cpus=cpus, starts=starts, say=lambda line: None)


def test_turns_alternate(tmp_path: Path) -> None:
    """Each warms up alone; then a round of one, a round of the other, in every start."""
    diary = tmp_path / "diary"
    team = [contestant("a", diary), contestant("b", diary, work=200_000)]
    outcome = held(team, tmp_path, Pace(steps=2, rounds=3, warmup=1, checked=1), starts=2)
    assert diary.read_text() == "a b " + 2 * "a a b b " + "a b " + "a a b b "
    assert [len(rounds) for rounds in outcome.rounds.values()] == [3, 3]
    assert all(told["work"] == 6.0 and told["steps"] == 2 for told in outcome.rounds["a"])
    assert outcome.ratio("a", "b").low > 1, "twenty times the work in each step"
    assert outcome.differences == {"a": 0.0, "b": 0.0}


def test_other_losses_are_other_work(tmp_path: Path) -> None:
    team = [contestant("a", tmp_path / "diary"), contestant("b", tmp_path / "diary", shift=2e-4)]
    with pytest.raises(ContestError, match=r"b and a do other work.*2\.00e-04"):
        held(team, tmp_path, Pace(steps=1, rounds=1, warmup=3, checked=3))


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise KeyError('late')"])
def test_a_contestant_that_fails_at_its_end_fails_the_contest(tmp_path: Path, end: str) -> None:
    with pytest.raises(ContestError, match="b ended with code"):
        held([contestant("b", tmp_path / "diary", end=end)], tmp_path, Pace(steps=1, rounds=1, warmup=1, checked=1))


def test_the_ratio_is_of_rounds_side_by_side() -> None:
    """A machine that is slow in one round is slow for both: 2, 3 and 4, not what the medians of each would give."""
    rounds = {
        "a": [{"cpu_s": 1.0, "work": 10.0, "steps": 1}, {"cpu_s": 5.0, "work": 10.0, "steps": 1}],
        "b": [{"cpu_s": 2.0, "work": 10.0, "steps": 1}, {"cpu_s": 20.0, "work": 10.0, "steps": 1}],
    }
    rounds["a"].append({"cpu_s": 1.0, "work": 12.0, "steps": 1})
    rounds["b"].append({"cpu_s": 1.0, "work": 4.0, "steps": 1})
    outcome = Outcome("cpu_s", rounds)
    assert outcome.ratio("a", "b") == Spread(3.0, 2.0, 4.0)
    assert outcome.more_us_per_step("b", "a") == Spread(1e6, 0.0, 15e6)


def test_a_loaded_machine_is_refused() -> None:
    assert machine.refusal(0.05) is None
    assert "1.30 cores" in str(machine.refusal(1.3))
    assert 0 <= machine.busy_cores(0.05) <= os.cpu_count() * 1.5


def test_the_table_judges_the_median(tmp_path: Path) -> None:
    results = {
        "loop": [Row("ours", "us/step", Spread(150.0, 90.0, 400.0), Bar("<=", 150.0), note="beyond 900 us")],
        "decoder": [
            Row("ours / plain", "x", Spread(0.979, 0.97, 0.99), Bar(">=", 0.98)),
            Row("ours", "tokens/s", Spread(5e5, 5e5, 5e5), Bar(">=", 4.7e5), Bar(">=", 5.6e5)),
            Row("plain", "tokens/s", Spread(12345.0, 12000.0, 13000.0)),
        ],
    }
    lines = report.table(results).splitlines()[2:]
    verdicts = [[cell.strip() for cell in line.split("|")][7] for line in lines]
    assert verdicts == ["met", "missed", "met / missed", ""]
    assert "12,345" in lines[3]
    about = {"commit": None, "date": "2026-01-01T00:00:00", "machine": "a machine"}
    entry = {"heading": "h.", "about": about, "loaded": True, "skipped": ["litgpt"]}
    report.write(tmp_path, "cpu", {n: {**entry, "rows": report.recorded(rows)} for n, rows in results.items()})
    report.write(tmp_path, "cpu", {"loop": {**entry, "rows": report.recorded(results["loop"])}})
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert report.rows_of(kept) == results, "a measure that is not taken again stays"
    assert "on a loaded machine" in (tmp_path / "cpu.md").read_text()
    anew = {
        **entry,
        "about": about | {"date": "2026-02-02"},
        "skipped": [],
        "rows": report.recorded(results["decoder"][1:2]),
    }
    report.write(tmp_path, "cpu", {"decoder": anew}, part=True)
    merged = json.loads((tmp_path / "cpu.json").read_text())["decoder"]
    assert {row["case"]: row.get("taken", about)["date"] for row in merged["rows"]} == {
        "ours / plain": "2026-01-01T00:00:00",
        "plain": "2026-01-01T00:00:00",
        "ours": about["date"],
    }, "a case that is not taken again stays, and says when it was"
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_a_round_below_nothing_is_drawn_as_far_right_as_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    rows = [
        Row("ours", "us", Spread(50.0, -10.0, 100.0), Bar("<=", 150.0)),
        Row("theirs", "x", Spread(2.0, 1.5, 2.5), Bar(">=", 1.0)),
    ]
    report.picture({"loop": rows}, tmp_path / "cpu.png")
    spreads = [line.get_xdata() for line in drawn[0].axes[0].lines[:4:2]]
    assert [list(ends) for ends in spreads] == [[1.5, 2.5], [1.5, 4.5]]
    monkeypatch.undo()
    plt.close(drawn[0])


def test_padded_rows_hold_the_documents_of_packed_ones() -> None:
    packed = {
        "tokens": torch.tensor([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]]),
        "labels": torch.tensor([[6, 7, -100, 9, -100, -100], [2, 3, 4, 5, 6, 7]]),
        "documents": torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]),
        "positions": torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
        "samples": torch.tensor([7, 8]),
    }
    [padded] = apart([packed], {"labels": -100, "tokens": 99})
    assert padded["tokens"].tolist() == [[5, 6, 7, 99, 99, 99], [8, 9, 99, 99, 99, 99], [1, 2, 3, 4, 5, 6]]
    assert padded["labels"].tolist() == [[6, 7] + [-100] * 4, [9] + [-100] * 5, [2, 3, 4, 5, 6, 7]]
    assert padded["documents"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert "samples" not in padded


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_measure_is_found(device: str) -> None:
    found = measures(device)
    files = {path.stem for path in (Path(report.__file__).parent / device).glob("*.py")}
    assert set(found) == files
    assert all(callable(module.measure) and module.__doc__ for module in found.values())
