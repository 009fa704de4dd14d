"""A sweep in pictures, as SVG: a line for each job through all that was swept, and the metric over each key."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

_MAP = colormaps["viridis_r"]
_DECADES = 1.0  # values further apart than a factor of ten are drawn on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """The values of one key, a job each, on a scale: `positions` from 0 to 1, and where which `ticks` are."""

    name: str
    positions: list[float]
    ticks: list[tuple[float, str]]


def axis(name: str, texts: Sequence[str]) -> Axis:
    """Numbers by their size, on a logarithmic scale if they are that far apart; words one beside the other."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        words = sorted(set(texts))
        places = {word: n / max(1, len(words) - 1) for n, word in enumerate(words)}
        return Axis(name, [places[text] for text in texts], [(place, word) for word, place in places.items()])
    low, high = min(numbers), max(numbers)
    if low > 0 and math.log10(high / low) > _DECADES:
        scaled = [math.log10(number) for number in numbers]
    else:
        scaled = list(numbers)
    first, span = min(scaled), (max(scaled) - min(scaled)) or 1.0
    distinct = sorted(set(numbers))
    shown = distinct if len(distinct) <= 6 else [low, high]
    of = dict(zip(numbers, ((value - first) / span for value in scaled), strict=True))
    return Axis(name, [of[number] for number in numbers], [(of[number], f"{number:.3g}") for number in shown])


@rc_context({"text.parse_math": False})  # a value with two $ is no formula
def parallel(axes: Sequence[Axis], metric: str, values: Sequence[float], lower_is_better: bool) -> str:
    """Parallel coordinates: each job a line over all keys to its metric; better ones are darker, and in front."""
    figure = Figure(figsize=(max(6.0, 2.0 * len(axes) + 3.0), 4.2), layout="constrained")
    plot = figure.subplots()
    last = axis(metric, [str(value) for value in values])
    columns = [*axes, last]
    shades = Normalize(min(values), max(values))
    order = sorted(range(len(values)), key=lambda n: -values[n] if lower_is_better else values[n])
    for job in order:
        shade = shades(values[job]) if lower_is_better else 1 - shades(values[job])
        heights = [column.positions[job] for column in columns]
        plot.plot(range(len(columns)), heights, color=_MAP(1 - shade), linewidth=1.6, alpha=0.85)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for place, column in enumerate(columns):
        plot.axvline(place, color="0.4", linewidth=0.8, zorder=0)
        for height, text in column.ticks:
            beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center"}
            plot.annotate(text, (place, height), (-4, 0), size=8, bbox=behind, **beside)
    plot.set_xticks(range(len(columns)), [column.name for column in columns])
    plot.set_xlim(-0.45, len(columns) - 0.85)
    plot.set_yticks([])
    for side in plot.spines.values():
        side.set_visible(False)
    return _svg(figure)


@rc_context({"text.parse_math": False})
def over_key(name: str, texts: Sequence[str], metric: str, values: Sequence[float], pruned: Sequence[bool]) -> str:
    """The metric of each job over one key; jobs that were ended early are hollow, as they were measured earlier."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    plot = figure.subplots()
    try:
        places: list[float] = [float(text) for text in texts]
        if min(places) > 0 and math.log10(max(places) / min(places)) > _DECADES:
            plot.set_xscale("log")
        elif len(set(texts)) <= 6:
            plot.set_xticks(places, texts)
    except ValueError:
        words = sorted(set(texts))
        places = [words.index(text) for text in texts]
        plot.set_xticks(range(len(words)), words)
        plot.set_xlim(-0.5, len(words) - 0.5)
    for hollow in (False, True):
        chosen = [n for n, is_pruned in enumerate(pruned) if is_pruned == hollow]
        face: Any = "none" if hollow else "#31688e"
        plot.scatter([places[n] for n in chosen], [values[n] for n in chosen], facecolors=face, edgecolors="#31688e")
    plot.set_xlabel(name)
    plot.set_ylabel(metric)
    plot.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
