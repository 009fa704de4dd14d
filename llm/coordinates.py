"""`python -m llm coordinates`: whether a configuration learns alike at every width (Yang et al. 2022, arXiv:2203.03466,
appendix D.1).

Some steps are trained at several widths, and the sizes of activations are drawn over the width. Under the maximal
update parametrization what a step changes is as large at any width. Where it grows, a learning rate that is right for a
narrow network is too high for a wide one; where it falls, wide ones stop learning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, open_dict

from llm.agree import agree
from llm.build import build, built
from llm.callback.coordinates import Coordinates, Size
from llm.config import ConfigError
from llm.console import quiet
from llm.data import TextData
from llm.guard import DivergedError
from llm.machine import accelerator
from llm.model import TransformerConfig, node_of
from llm.run import settled

Sizes = dict[str, dict[int, list[Size]]]  # part -> width -> its size at each step, from 0 on; the mean over seeds
# How a size may go with the width, as a power of it. Exact powers are what limits have, and widths from 32 on are no
# limit: what a standard parametrization does goes with powers from 0.5 on. A network of any width may begin with less
# attention and smaller logits in wider networks: they are sums over independent weights then.
LARGEST, SMALLEST_CHANGE = 0.4, -0.5


class Slope(NamedTuple):
    """Powers of the width that a part's sizes go with: before the first step, after the last, and of what changed."""

    part: str
    start: float
    end: float
    change: float

    @property
    def problem(self) -> str:
        """What is wrong with it; nothing if it is as it has to be."""
        powers = (self.start, self.end, self.change)
        if not all(map(math.isfinite, powers)):
            return "diverges"
        if max(powers) > LARGEST:
            return "grows with the width"
        return "learns less with the width" if self.change < SMALLEST_CHANGE else ""


@dataclass(frozen=True)
class Check:
    """What was trained, and what came of it."""

    parametrization: str
    base_dim: int | None
    widths: list[int]
    n_steps: int
    n_seeds: int
    sizes: Sizes

    @property
    def slopes(self) -> list[Slope]:
        """Of each part."""
        return [
            Slope(
                part,
                _slope({width: sizes[0].now for width, sizes in by_width.items()}),
                _slope({width: sizes[-1].now for width, sizes in by_width.items()}),
                _slope({width: sizes[-1].change for width, sizes in by_width.items()}),
            )
            for part, by_width in self.sizes.items()
        ]

    @property
    def passed(self) -> bool:
        """Whether all parts do as they have to."""
        return not any(slope.problem for slope in self.slopes)


def check(
    cfg: DictConfig, widths: Sequence[int], n_steps: int, n_seeds: int, say: Callable[[str], None] = print
) -> Check:
    """Train what `cfg` describes for some steps at each width, on its data, which is prepared if it has to be.

    Its optimizer and learning rate are taken, but no schedule: the rate is the peak's from the first step on.

    Raises:
        ConfigError: if there is no such network, or the run would not begin with new weights.
    """
    for key, value in (("init_from", cfg.init_from), ("adapter", cfg.adapter and cfg.adapter._target_)):
        if value is not None:
            raise ConfigError([f"{key}: {value} - coordinates are checked from the first weights on - leave it out"])
    quiet()
    cfg = _short(cfg, n_steps)
    data, objective = settled(cfg)
    model = built(cfg.model)
    agree(cfg, model, data, built(cfg.strategy), None, objective)
    models = [at_width(model, width) for width in widths]
    data.prepare()
    sizes: Sizes = {}
    for network in models:
        runs = [_trained(cfg, data, network, cfg.seed + number, n_steps) for number in range(n_seeds)]
        for part in runs[0][0]:
            mean = [_mean([run[step][part] for run in runs]) for step in range(n_steps + 1)]
            sizes.setdefault(part, {})[network.dim] = mean
        say(f"width {network.dim}: {n_seeds} x {n_steps} steps")
    return Check(model.parametrization, model.base_dim, list(widths), n_steps, n_seeds, sizes)


def at_width(model: TransformerConfig, width: int) -> TransformerConfig:
    """The same network of another width: its feed-forward in proportion, and with it the heads: more of them where
    head_dim is given, else wider ones.

    Raises:
        ConfigError: if there is none.
    """
    times = width / model.dim
    keys = ["ffn_dim"] + ([] if model.head_dim is None else ["n_heads", "n_kv_heads"])
    changes = {key: getattr(model, key) * times for key in keys if getattr(model, key) is not None}
    uneven = [f"model.{key}={getattr(model, key)}" for key, value in changes.items() if value % 1 or value < 1]
    if uneven:
        rule = f"is {times:g} of model.dim={model.dim}, and so much of {' and '.join(uneven)} is no whole number"
        raise ConfigError([f"--widths: {width} - {rule} - take other widths"])
    whole: dict[str, Any] = {key: int(value) for key, value in changes.items()}
    try:
        return replace(model, dim=width, **whole)
    except ValueError as error:
        raise ConfigError([f"--widths: {width} - {line}" for line in str(error).splitlines()]) from error


def _short(cfg: DictConfig, n_steps: int) -> DictConfig:
    """So many steps on one device in full precision, which leave nothing."""
    cfg = cfg.copy()
    device = accelerator(cfg.trainer.accelerator)
    with open_dict(cfg):
        cfg.schedule = {"_target_": "llm.schedule.Constant", "warmup_steps": 0}
        cfg.strategy = {"_target_": "llm.strategy.Single", "accelerator": device}
        cfg.callback, cfg.logger = {}, {}
        cfg.trainer.update({"max_steps": n_steps, "max_tokens": None, "max_epochs": None, "limit_val_batches": 0})
        cfg.trainer.update({"devices": 1, "num_nodes": 1, "accelerator": device, "precision": "32-true"})
    return cfg


def _trained(
    cfg: DictConfig, data: TextData, model: TransformerConfig, seed: int, n_steps: int
) -> list[dict[str, Size]]:
    """The sizes at each step; those after it diverged are infinite."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model, cfg.seed = node_of(model), seed
    trainer, objective = build(cfg)
    seen = Coordinates()
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(seen)
    try:
        trainer.fit(objective, datamodule=data)
    except DivergedError:
        lost = dict.fromkeys(seen.sizes[0], Size(math.inf, math.inf))
        return seen.sizes + [lost] * (n_steps + 1 - len(seen.sizes))
    return seen.sizes


def _mean(sizes: Sequence[Size]) -> Size:
    return Size(*(sum(values) / len(values) for values in zip(*sizes, strict=True)))


def _slope(sizes: Mapping[int, float]) -> float:
    """The power of the width that sizes go with, by least squares; not a number where one is not finite, or nothing."""
    if not all(0 < size < math.inf for size in sizes.values()):
        return math.nan
    points = [(math.log2(width), math.log2(size)) for width, size in sizes.items()]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def table(found: Check) -> str:
    """A line for each part."""
    width = max(len(part) for part in found.sizes)
    lines = [f"{'size ~ width ^':<{width}}  {'start':>6} {'end':>6} {'change':>6}"]
    for slope in found.slopes:
        numbers = " ".join(f"{value:>6.2f}" for value in (slope.start, slope.end, slope.change))
        lines.append(f"{slope.part:<{width}}  {numbers}  {slope.problem}".rstrip())
    return "\n".join(lines)


def write(found: Check, out: Path) -> None:
    """`coordinates.json` and `coordinates.png`."""
    out.mkdir(parents=True, exist_ok=True)
    slopes = [{**slope._asdict(), "problem": slope.problem} for slope in found.slopes]
    content = _finite({"passed": found.passed, "slopes": slopes, **asdict(found)})
    (out / "coordinates.json").write_text(json.dumps(content, indent=1) + "\n")
    _draw(found, out / "coordinates.png")


def _finite(value: Any) -> Any:
    """JSON has no other numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLOURS = {"embed": "#6b7280", "attention": "#2563eb", "cross_attention": "#7c3aed", "feed_forward": "#c2410c"}


def _draw(found: Check, path: Path) -> None:
    """The sizes at the start, at the end, and of what changed, over the width: what has to be no steeper than flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns: list[tuple[str, Callable[[list[Size]], float]]] = [
        ("before the first step", lambda sizes: sizes[0].now),
        (f"after {found.n_steps} steps", lambda sizes: sizes[-1].now),
        ("what the steps changed", lambda sizes: sizes[-1].change),
    ]
    figure, axes = plt.subplots(1, len(columns), figsize=(13, 4), sharey=True, layout="constrained")
    problems = {slope.part: slope.problem for slope in found.slopes}
    shown: set[str] = set()
    for axis, (title, number) in zip(axes, columns, strict=True):
        for part, by_width in found.sizes.items():
            kind = part.rpartition(".")[2]
            label = kind.replace("_", "-") if kind not in shown else None
            shown.add(kind)
            colour, style = _COLOURS.get(kind, "#111827"), ":" if problems[part] else "-"
            sizes = [number(sizes) for sizes in by_width.values()]
            axis.plot(list(by_width), sizes, style, marker="o", markersize=3, color=colour, label=label)
        axis.set(title=title, xlabel="width", xscale="log", yscale="log")
        axis.set_xticks(found.widths, map(str, found.widths), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("mean absolute activation")
    figure.legend(loc="outside right center", fontsize=8)
    base = f", base_dim={found.base_dim}" if found.base_dim else ""
    figure.suptitle(f"model.parametrization={found.parametrization}{base} (dotted: outside of what is allowed)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
