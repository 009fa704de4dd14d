"""A sweep as one HTML page that needs nothing else: the table, and the pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from llm.submit.record import Contents
from llm.sweep.outcome import Outcome
from llm.sweep.plot import axis, over_key, parallel
from llm.sweep.table import best, count, keys, short, values

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
tr.best td { background: #eaf4ea; font-weight: 600; }
tr.failed td { color: #a33; } tr.pruned td, tr.running td, tr.waiting td, tr.interrupted td { color: #777; }
figure { display: inline-block; margin: 1rem 1rem 0 0; } img { max-width: 100%; }
"""


def page(name: str, contents: Contents, found: Sequence[Outcome]) -> str:
    """The whole page. Pictures show the jobs that have a metric, by the keys in which jobs differ."""
    first = best(contents, found)
    counts = ", ".join(f"{n} {status}" for status, n in count(found).items())
    told = "" if first is None or first.metric is None else f"; best: job {first.number}, {first.metric:.6g}"
    title = html.escape(name)
    about = html.escape(f"{len(found)} jobs: {counts}{told}. {contents.metric}, to {contents.direction}.")
    body = "\n".join([f"<h1>{title}</h1>", f"<p>{about}</p>", *_pictures(contents, found), _table(contents, found)])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(contents: Contents, found: Sequence[Outcome]) -> str:
    """Best first, then those without a number."""
    swept, first = keys(contents), best(contents, found)
    sign = -1 if contents.direction == "maximize" else 1
    rows = [_cells("th", ["job", *swept, contents.metric, "status", ""])]
    ranks = {"finished": 0, "pruned": 1, "running": 2}
    for job in sorted(found, key=lambda job: (ranks.get(job.status, 3), job.metric is None, sign * (job.metric or 0))):
        settings = values(contents.jobs[job.number].job)
        number = "" if job.metric is None else f"{job.metric:.6g}"
        note = (f"{job.code}: " if job.code else "") + job.note
        cells = [str(job.number), *(short(settings.get(key, "")) for key in swept), number, job.status, note]
        rows.append(_cells("td", cells, "best" if job is first else job.status))
    return f"<table>{''.join(rows)}</table>"


def _cells(tag: str, texts: Sequence[str], name: str = "") -> str:
    inside = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f'<tr class="{name}">{inside}</tr>\n'


def _pictures(contents: Contents, found: Sequence[Outcome]) -> list[str]:
    """Parallel coordinates, and one picture for each key."""
    shown = [job for job in found if job.metric is not None and job.status != "failed"]
    swept = keys(contents)
    if not shown or not swept:
        return []
    settings = [values(contents.jobs[job.number].job) for job in shown]
    columns = {key: [one.get(key, "-") for one in settings] for key in swept}
    metrics = [job.metric for job in shown if job.metric is not None]
    pruned = [job.status != "finished" for job in shown]
    axes = [axis(key, texts) for key, texts in columns.items()]
    pictures = [parallel(axes, contents.metric, metrics, contents.direction == "minimize")]
    pictures += [over_key(key, texts, contents.metric, metrics, pruned) for key, texts in columns.items()]
    names = ["all keys", *swept]
    return [_picture(name, svg) for name, svg in zip(names, pictures, strict=True)]


def _picture(name: str, svg: str) -> str:
    """As an image of its own, since names inside of one would be taken for those inside of another."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<figure><img alt="{html.escape(name)}" src="data:image/svg+xml;base64,{data}"></figure>'
