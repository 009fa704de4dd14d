"""The run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, float | None]]
_TRAIN, _VALIDATION, _QUIET = "#9db4d0", "#c2410c", "#6b7280"


def plot_run(rows: Rows, baselines: Mapping[str, float], path: Path) -> None:
    """Draw loss, bits per byte beside the baselines, learning rate, gradient norm and speed over tokens, into `path`.

    Args:
        rows: of metrics.jsonl.
        baselines: `NAME/bits_per_byte` -> value, drawn as lines to be beaten.
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
        figure, axes = plt.subplot_mosaic(
            [["loss", "loss", "bits"], ["loss", "loss", "bits"], ["lr", "norm", "speed"]], figsize=(12, 7)
        )
        _draw_loss(axes["loss"], rows)
        _draw_bits(axes["bits"], rows, baselines)
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


def _draw_loss(axis: Any, rows: Rows) -> None:
    """Training loss as it was, and validation on top; the scale is chosen by the values after the first drop."""
    axis.plot(*_series(rows, "train/loss"), color=_TRAIN, linewidth=1.5, label="train")
    tokens, losses = _series(rows, "val/loss")
    axis.plot(tokens, losses, color=_VALIDATION, marker="o", markersize=4, label="validation")
    if losses:
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
    for name, value in baselines.items():
        label = name.removesuffix("/bits_per_byte")
        axis.axhline(value, color=_QUIET, linestyle="--", linewidth=1)
        axis.annotate(
            f"{label} {value:.2f}",
            (1, value),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=_QUIET,
        )
    axis.set_title("validation, bits per byte", loc="left", fontweight="bold")
    axis.set_ylim(bottom=0)


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have `key`."""
    found = [(row["tokens"], row.get(key)) for row in rows]
    pairs = [(tokens, value) for tokens, value in found if tokens is not None and value is not None]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]
