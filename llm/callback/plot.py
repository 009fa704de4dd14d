"""The run as one picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, float | None]]
_TRAIN, _VALIDATION, _QUIET = "#9db4d0", "#c2410c", "#6b7280"


def plot_run(rows: Rows, baselines: Mapping[str, float], path: Path) -> None:
    """Draw loss, learning rate, gradient norm and speed over tokens into `path`, with bits per byte or the accuracy of
    pairs where the run has them.

    Args:
        rows: of metrics.jsonl.
        baselines: `NAME/bits_per_byte` and `NAME/loss` -> value, drawn as lines to be beaten.
        path: a .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 9,
    }
    with plt.rc_context(style):
        side = _side(rows)
        figure, axes = plt.subplot_mosaic(
            [["loss", "loss", side], ["loss", "loss", side], ["lr", "norm", "speed"]], figsize=(12, 7)
        )
        _draw_loss(axes["loss"], rows, baselines)
        if side == "bits":
            _draw_bits(axes["bits"], rows, baselines)
        elif side == "pairs":
            _draw_pairs(axes["pairs"], rows)
        for name, key, title in (
            ("lr", "lr", "learning rate"),
            ("norm", "grad/norm", "gradient norm, before clipping"),
            ("speed", "speed/tokens_per_s", "tokens per second"),
        ):
            axes[name].plot(*_series(rows, key), color=_QUIET, linewidth=1)
            axes[name].set_title(title, loc="left")
            axes[name].set_ylim(bottom=0)
        for axis in axes.values():
            axis.set_xlabel("tokens")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 10M
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _side(rows: Rows) -> str:
    """What stands beside the loss; without anything the loss takes the place."""
    names = {name for row in rows for name in row}
    if "val/next_sentence_accuracy" in names:
        return "pairs"
    return "loss" if "val/loss" in names and "val/bits_per_byte" not in names else "bits"


def _draw_loss(axis: Any, rows: Rows, baselines: Mapping[str, float]) -> None:
    """Training loss as it was, and validation on top, of several tasks each; the scale is chosen by the values after
    the first drop."""
    tasks = dict.fromkeys(name for row in rows for name in row if name.startswith("val/loss/"))
    for name, style in zip(tasks, itertools.cycle(("--", ":", "-.")), strict=False):
        label = f"validation, {name.removeprefix('val/loss/')}"
        axis.plot(*_series(rows, name), color=_VALIDATION, linewidth=1, linestyle=style, label=label)
    axis.plot(*_series(rows, "train/loss"), color=_TRAIN, linewidth=1.5, label="train")
    tokens, losses = _series(rows, "val/loss")
    axis.plot(tokens, losses, color=_VALIDATION, marker="o", markersize=4, label="validation")
    if losses:
        _draw_baselines(axis, baselines, "/loss")
        axis.annotate(
            f"{losses[-1]:.3f}",
            (tokens[-1], losses[-1]),
            (0, 8),
            textcoords="offset points",
            ha="right",
            color=_VALIDATION,
        )
    axis.set_title("loss, nats per token", loc="left", fontweight="bold")
    axis.set_yscale("log")
    axis.grid(which="both", alpha=0.25)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(frameon=False)


def _draw_bits(axis: Any, rows: Rows, baselines: Mapping[str, float]) -> None:
    """Validation bits per byte falling through the baselines."""
    tokens, bits = _series(rows, "val/bits_per_byte")
    axis.plot(tokens, bits, color=_VALIDATION, marker="o", markersize=4)
    if bits:
        axis.annotate(
            f"{bits[-1]:.3f}", (tokens[-1], bits[-1]), (0, 8), textcoords="offset points", ha="right", color=_VALIDATION
        )
    _draw_baselines(axis, baselines, "/bits_per_byte")
    axis.set_title("validation, bits per byte", loc="left", fontweight="bold")
    axis.set_ylim(bottom=0)


def _draw_pairs(axis: Any, rows: Rows) -> None:
    """How many pairs are told apart, rising from what guessing gets."""
    for split, color in (("train", _TRAIN), ("val", _VALIDATION)):
        axis.plot(*_series(rows, f"{split}/next_sentence_accuracy"), color=color, label=split)
    _draw_baselines(axis, {"guessing/accuracy": 0.5}, "/accuracy")
    axis.set_title("next sentence, accuracy", loc="left", fontweight="bold")
    axis.set_ylim(0.4, 1)


def _draw_baselines(axis: Any, baselines: Mapping[str, float], unit: str) -> None:
    """A line for each baseline of that unit."""
    for name, value in baselines.items():
        if not name.endswith(unit):
            continue
        axis.axhline(value, color=_QUIET, linestyle="--", linewidth=1)
        axis.annotate(
            f"{name.removesuffix(unit)} {value:.2f}",
            (1, value),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=_QUIET,
        )


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have `key`."""
    found = [(row["tokens"], row.get(key)) for row in rows]
    pairs = [(tokens, value) for tokens, value in found if tokens is not None and value is not None]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]
