"""What a sweep has found: as a table, as CSV, and as a page."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm.__main__ import main
from llm.submit.record import Job, Record
from llm.sweep.outcome import outcomes
from llm.sweep.plot import axis
from llm.sweep.table import as_csv, table

LRS = ["0.001", "0.01", "0.1", "1.0", "0.003", "0.02", "0.5"]
END = {"code": 0, "cause": "finished", "step": 9, "max_steps": 9}


def left(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture
def folder() -> Path:
    """Of every kind a job: finished twice, failed, pruned, at work, killed, and not begun."""
    made = Path("runs/mine")
    record = Record(made)
    jobs = [Job(n, [f"optimizer.lr={lr}", "model.dim=64", f"+data.note={'abcabca'[n]}"]) for n, lr in enumerate(LRS)]
    record.enter(jobs)
    for job in jobs[:6]:
        record.started(job, made / f"log-{job.number}.txt")
    left(made / "0", exit=END, summary={"steps": 9, "val/loss": 2.5, "versions": {}})
    left(made / "1", exit=END, summary={"steps": 9, "val/loss": 1.5, "tokens": 640})
    left(made / "2", exit={"code": 79, "cause": "DivergedError: step 4: it leaps\nmore"})
    left(made / "3", exit=END | {"cause": "stopped early", "step": 3}, summary={"val/loss": 0.5, "pruned": 3})
    rows = [{"step": 2, "val/loss": 4.5}, {"step": 3, "train/loss": 1.0}]
    for number in (4, 5):
        left(made / str(number), attempts={})
        (made / str(number) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (made / str(number) / "config.yaml").write_text("trainer: {max_steps: 9}\n")
        (made / str(number) / "attempts.json").rename(made / str(number) / "attempts.jsonl")
        (made / str(number) / ".lock").mkdir()
        (made / str(number) / ".lock" / "00000000.json").touch()
    os.utime(made / "5" / ".lock" / "00000000.json", (0, time.time() - 3600))
    return made


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "mine"])
    told = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", row) for row in told[:8]] == [
        ["job", "optimizer.lr", "data.note", "val/loss", "status"],
        ["0", "0.001", "a", "2.5", "finished"],
        ["1", "0.01", "b", "1.5", "finished"],
        ["2", "0.1", "c", "failed", "79: DivergedError: step 4: it leaps"],
        ["3", "1.0", "a", "0.5", "pruned", "at step 3"],
        ["4", "0.003", "b", "4.5", "running", "step 3/9"],
        ["5", "0.02", "c", "4.5", "interrupted", "step 3/9"],
        ["6", "0.5", "a", "waiting"],
    ]
    assert told[8] == (
        "7 jobs: 2 finished, 1 failed, 1 pruned, 1 running, 1 interrupted, 1 waiting; best: job 1, val/loss 1.5"
    )
    assert told[9:] == ["runs/mine/report.html", "runs/mine/report.csv"]
    main(["report", str(folder), "--maximize", "--out", "elsewhere/it.html"])
    assert "best: job 0" in capsys.readouterr().out
    assert Path("elsewhere/it.csv").exists()


def test_the_csv(folder: Path) -> None:
    rows = list(csv.DictReader(as_csv(*outcomes(folder)).splitlines()))
    assert [row["optimizer.lr"] for row in rows] == LRS
    assert [row["status"] for row in rows].count("finished") == 2
    assert (rows[1]["val/loss"], rows[1]["tokens"], rows[1]["code"], rows[2]["code"]) == ("1.5", "640", "0", "79")
    assert "versions" not in rows[0]


class _Page(HTMLParser):
    """Tags that a page has, what it would load, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else(folder: Path) -> None:
    """A picture of all keys, and one for each; no script, and nothing from elsewhere."""
    main(["report", "mine"])
    page = _Page()
    page.feed((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("tr") == 1 + 7
    assert len(page.loads) == 1 + 2
    for picture in page.loads:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(data))
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    text = base64.b64decode(page.loads[0].partition(",")[2]).decode()
    assert all(f"<!-- {name} -->" in text for name in ("optimizer.lr", "data.note", "val/loss"))


def test_what_users_write_is_not_taken_for_html() -> None:
    record = Record(Path("runs/odd"))
    record.enter([Job(n, [f"+data.note='<b>{n}</b>'", f"+data.other='${{a}}_{n}_${{b}}'"]) for n in (0, 1)])
    for n in (0, 1):
        left(record.folder / str(n), exit=END, summary={"steps": 9, "val/loss": 2.5 + n})
    main(["report", "odd"])
    page = Path("runs/odd/report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;0" in page


@pytest.mark.parametrize(
    ("texts", "positions"),
    [
        (["1", "2", "3"], [0, 0.5, 1]),
        (["1e-4", "1e-2", "1e-3"], [0, 1, 0.5]),
        (["b", "a", "b"], [1, 0, 1]),
        (["0", "100"], [0, 1]),
        (["5", "5"], [0, 0]),
        (["small", "5"], [1, 0]),
    ],
)
def test_values_have_their_places(texts: list[str], positions: list[float]) -> None:
    assert axis("key", texts).positions == pytest.approx(positions)


def test_a_single_job_shows_all_its_keys() -> None:
    record = Record(Path("runs/one"))
    record.enter([Job(0, ["seed=1", "model.dim=8"])])
    assert table(*outcomes(record.folder)).splitlines()[0].split() == ["job", "seed", "model.dim", "val/loss", "status"]


def test_no_such_sweep(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left_with:
        main(["report", "mien"])
    assert left_with.value.code == 64
    assert "sweep: mien - no sweep.jsonl here - did you mean mine?" in capfd.readouterr().err
