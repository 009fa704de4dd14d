"""What measures found: a table, a record, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import Spread
from benchmarks.measure import Bar, Row

_HEAD = ("measure", "case", "median", "min to max", "unit", "bar", "", "note")


def verdict(bar: Bar | None, figure: float) -> str:
    """Of one figure before its bar."""
    return "" if bar is None else "met" if bar.met(figure) else "missed"


def table(results: Mapping[str, Sequence[Row]]) -> str:
    """Markdown, one line a row. The median is judged."""
    lines = [_HEAD, tuple("---" for _ in _HEAD)]
    for name, rows in results.items():
        for row in rows:
            lines.append((name, row.case, *_cells(row), row.note))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    value = row.value
    bars = [bar for bar in (row.bar, row.stretch) if bar is not None]
    spread = f"{_number(value.low)} to {_number(value.high)}"
    verdicts = " / ".join(verdict(bar, value.median) for bar in bars)
    return _number(value.median), spread, row.unit, " / ".join(map(str, bars)), verdicts


def _number(value: float) -> str:
    if value == 0 or 0.1 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2e}"


def recorded(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For the file."""
    found = []
    for row in rows:
        bars = {kind: str(bar) for kind, bar in (("bar", row.bar), ("stretch", row.stretch)) if bar is not None}
        judged = {} if row.bar is None else {"verdict": verdict(row.bar, row.value.median)}
        base = {"case": row.case, "unit": row.unit, **asdict(row.value), **bars, **judged}
        told = {name: value for name, value in (("note", row.note), ("figures", row.figures)) if value}
        found.append(base | told)
    return found


def rows_of(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Name of a measure -> its rows, from the file."""
    return {name: [_row(entry) for entry in measure["rows"]] for name, measure in record.items()}


def _row(entry: Mapping[str, Any]) -> Row:
    bars = {kind: Bar(*_parsed(entry[kind])) for kind in ("bar", "stretch") if kind in entry}
    spread = Spread(entry["median"], entry["low"], entry["high"])
    return Row(entry["case"], entry["unit"], spread, **bars, note=entry.get("note", ""))


def _parsed(bar: str) -> tuple[Any, float]:
    sense, value = bar.split()
    return sense, float(value)


def write(folder: Path, device: str, measured: Mapping[str, Mapping[str, Any]], part: bool = False) -> None:
    """`DEVICE.json`, `.md` and `.png`; measures that were not taken now keep what they have, and of those that were
    taken in `part` the other cases do."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {name: _merged(record[name], now) if part and name in record else now for name, now in measured.items()}
    path.write_text(json.dumps(record, indent=1) + "\n")
    results = rows_of(record)
    (folder / f"{device}.md").write_text(_markdown(record, results))
    picture(results, folder / f"{device}.png")


def _merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A measure with some cases taken anew; each of the others says when it was."""
    cases = {row["case"] for row in now["rows"]}
    about = {name: before["about"][name] for name in ("date", "commit")}
    kept = [{"taken": about, **row} for row in before["rows"] if row["case"] not in cases]
    open_ = [text for text in before["skipped"] if text.partition(": ")[0].replace(", ", ": ") not in cases]
    return {**now, "skipped": list(dict.fromkeys([*open_, *now["skipped"]])), "rows": [*kept, *now["rows"]]}


def _markdown(record: Mapping[str, Any], results: Mapping[str, list[Row]]) -> str:
    lines = [table(results), ""]
    for name, measure in record.items():
        about = measure["about"]
        loaded = ", on a loaded machine" if measure["loaded"] else ""
        commit = (about["commit"] or "no commit")[:12]
        lines.append(f"{name}: {measure['heading']} {about['date'][:10]}, {commit}, {about['machine']}{loaded}.")
        others = [row["taken"] for row in measure["rows"] if "taken" in row]
        taken = {(other["date"][:10], (other["commit"] or "no commit")[:12]) for other in others}
        lines += [f"{name}: some cases are of {date}, {commit}." for date, commit in sorted(taken)]
        lines += [f"{name}: not measured: {line}" for line in measure["skipped"]]
    return "\n".join(lines) + "\n"


def picture(results: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Figures that have a bar, over the bar: 1 is where it lies, and right of it is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"{name}: {row.case}", row.bar, row.value) for name, rows in results.items() for row in rows]
    judged = [(label, bar, value) for label, bar, value in rows if bar is not None and min(bar.value, value.median) > 0]
    edge = 1.5 * max((_beside(bar, value.median) for _, bar, value in judged), default=1.0)
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.32 * max(1, len(judged))))
    for place, (_, bar, value) in enumerate(reversed(judged)):
        points = sorted(_beside(bar, each) for each in (value.low, value.median, value.high))
        colour = "tab:green" if bar.met(value.median) else "tab:red"
        axis.plot([points[0], min(points[2], edge)], [place, place], color=colour)
        axis.plot([points[1]], [place], "o", color=colour)
    axis.axvline(1.0, color="grey", linestyle="--")
    axis.set_yticks(range(len(judged)), [f"{label} ({bar})" for label, bar, _ in reversed(judged)], fontsize=8)
    axis.set(xscale="log", xlabel="median, least and largest round over the bar;\nof what is to be small, bar over it")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _beside(bar: Bar, value: float) -> float:
    """What is to be small and is nothing, or less, is as far right as can be."""
    if bar.sense == ">=":
        return value / bar.value
    return bar.value / value if value > 0 else math.inf
