"""A sweep as rows: for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence

from llm.submit.record import Contents, Job
from llm.sweep.outcome import Outcome

_WIDTH = 100  # of what is said of a job in a line; the CSV has all of it


def keys(contents: Contents) -> list[str]:
    """The keys in which jobs differ; of a single job, all."""
    settings = [values(told.job) for told in contents.jobs.values()]
    names = list(dict.fromkeys(name for found in settings for name in found))
    if len(settings) < 2:
        return names
    return [name for name in names if len({found.get(name) for found in settings}) > 1]


def values(job: Job) -> dict[str, str]:
    """What a job's overrides set, by key."""
    pairs = (text.partition("=") for text in job.overrides)
    return {name.lstrip("+"): value for name, _, value in pairs}


def short(value: str) -> str:
    """A number as a person reads it; what was drawn has 17 digits."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value


def best(contents: Contents, found: Sequence[Outcome]) -> Outcome | None:
    """The best job of those that ended by themselves; pruned ones were measured earlier, and do not compare."""
    finished = [job for job in found if job.status == "finished" and job.metric is not None]
    sign = -1 if contents.direction == "maximize" else 1
    return min(finished, key=lambda job: sign * (job.metric or 0.0), default=None)


def table(contents: Contents, found: Sequence[Outcome]) -> str:
    """Aligned columns, a row for each job, and which is the best."""
    swept = keys(contents)
    rows = [["job", *swept, contents.metric, "status", ""]]
    for job in found:
        settings = values(contents.jobs[job.number].job)
        code = f"{job.code}: " if job.code else ""
        number = "" if job.metric is None else f"{job.metric:.6g}"
        shown = (short(settings.get(name, "")) for name in swept)
        rows.append([str(job.number), *shown, number, job.status, textwrap.shorten(code + job.note, _WIDTH)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = ", ".join(f"{n} {status}" for status, n in count(found).items())
    first = best(contents, found)
    told = "" if first is None else f"; best: job {first.number}, {contents.metric} {first.metric:.6g}"
    return "\n".join([*lines, f"{len(found)} jobs: {counts}{told}"])


def count(found: Sequence[Outcome]) -> dict[str, int]:
    """Jobs by status."""
    words = [job.status for job in found]
    return {word: words.count(word) for word in dict.fromkeys(words)}


def as_csv(contents: Contents, found: Sequence[Outcome]) -> str:
    """Everything that is known of each job: its values, how it ended, and the numbers of its summary."""
    swept = keys(contents)
    numbers = list(
        dict.fromkeys(
            name
            for job in found
            for name, value in job.summary.items()
            if isinstance(value, (int, float)) and name != contents.metric
        )
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *swept, contents.metric, "status", "code", "note", *numbers])
    for job in found:
        settings = values(contents.jobs[job.number].job)
        ended = [job.metric, job.status, job.code, job.note]
        cells = [job.number, *(settings.get(name) for name in swept), *ended]
        writer.writerow(["" if cell is None else cell for cell in [*cells, *map(job.summary.get, numbers)]])
    return text.getvalue()
