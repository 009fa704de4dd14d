"""Which learning rate is the best at which width: `python benchmarks/transfer.py TEXT.txt`, about an hour on one core.

Each family is trained at base_dim and at four times that, under the standard parametrization and under mup, with
learning rates that are a factor of 2 apart; at base_dim the two are one network. What counts is the training loss of
the last fifth of the steps, the mean over seeds. Runs that are in the file of results are not made again. Writes
benchmarks/results/transfer.json and docs/transfer.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llm.config import register  # noqa: E402
from llm.guard import DivergedError  # noqa: E402
from llm.run import run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "transfer.json"
PICTURE = ROOT / "docs" / "transfer.png"
BASE, WIDE = 64, 256
FAMILIES = {
    "decoder": ["model=tiny_decoder", "tokenizer=bpe", "tokenizer.vocab_size=512"],
    "encoder": [
        *("model=tiny_encoder", "objective=masked_lm", "data/tasks=masked_lm"),
        *("tokenizer=wordpiece", "tokenizer.vocab_size=128", "data.tasks.masked_lm.rate=0.4", "data.batch_size=16"),
    ],
    "encoder_decoder": [
        *("model=tiny_encoder_decoder", "objective=seq2seq", "data/tasks=span_denoising"),
        *("tokenizer=unigram", "tokenizer.vocab_size=128", "tokenizer.n_sentinels=20"),
    ],
}
SETTINGS = [
    *("model.qk_norm=false", "model.initialisation=vaswani", "optimizer=adamw", "schedule.warmup_steps=10"),
    *("data=text", "data.max_length=64", "data.batch_size=8", "data.micro_batch_size=null"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true"),
    *("trainer.val_check_interval=1000000", "callback.metrics.every_n_steps=10", "logger=none"),
    *(f"~callback.{name}" for name in ("ledger", "progress", "sample", "checkpoint", "watchdog", "summary")),
]
VARIANTS = ((BASE, "both"), (WIDE, "standard"), (WIDE, "mup"))


def overrides(family: str, width: int, parametrization: str, rate: float, seed: int, steps: int) -> list[str]:
    """Of train.py, without where things lie; the heads grow with the width."""
    shape = [f"model.dim={width}", f"model.ffn_dim={4 * width}", "model.n_layers=2", "model.n_heads=4"]
    mup = [] if parametrization == "standard" else ["model.parametrization=mup", f"model.base_dim={BASE}"]
    length = [f"optimizer.lr={rate!r}", f"seed={seed}", f"trainer.max_steps={steps}"]
    return [*SETTINGS, *FAMILIES[family], *shape, *mup, *length]


def curve(given: list[str], text: Path) -> list[float]:
    """The training loss of every ten steps; infinite from where it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"data.sources.text.path={text}", f"run_dir={folder}/run", "run_name=transfer"]
        try:
            run(compose("train", [*given, *places]))
        except DivergedError:
            return [math.inf]
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def final(losses: list[float]) -> float:
    """The mean of the last fifth."""
    n = max(1, len(losses) // 5)
    return sum(losses[-n:]) / n


def table(found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Of each family and variant the mean loss over seeds for each rate, and which rate is the best."""
    rows: dict[str, dict[str, Any]] = {}
    for name, losses in found.items():
        what, _, rest = name.partition(" 2^")
        power, _, seed = rest.partition(" seed ")
        rows.setdefault(what, {}).setdefault(int(power), {})[int(seed)] = final(losses)
    return {what: _summed(by_power) for what, by_power in rows.items()}


def _summed(by_power: dict[int, dict[int, float]]) -> dict[str, Any]:
    """Only over seeds that all of the best rate and its neighbours have: means of other seeds do not compare."""
    first = {power: by_seed[0] for power, by_seed in by_power.items() if 0 in by_seed}
    near = [power for power in first if abs(power - min(first, key=lambda p: first[p])) <= 1]
    seeds = sorted(set.intersection(*(set(by_power[power]) for power in near)))
    means = {
        power: sum(by_seed[seed] for seed in seeds) / len(seeds)
        for power, by_seed in sorted(by_power.items())
        if set(seeds) <= set(by_seed)
    }
    best = min(means, key=lambda power: means[power])
    rates = {f"2^{power}": round(loss, 4) for power, loss in means.items()}
    return {"best": best, "vertex": _vertex(means, best), "seeds": len(seeds), "losses": rates}


def _vertex(means: dict[int, float], best: int) -> float | None:
    """Where the parabola through the best rate and its neighbours is lowest, as a power of 2; none at an end."""
    if not {best - 1, best + 1} <= means.keys():
        return None
    below, at, above = (means[power] for power in (best - 1, best, best + 1))
    return round(best + 0.5 * (below - above) / (below - 2 * at + above), 2)


def drawn(rows: dict[str, dict[str, Any]], picture: Path) -> None:
    """The loss over the learning rate, a panel for each family and parametrization."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(FAMILIES), figsize=(12, 6.5), sharex=True, layout="constrained")
    for column, family in enumerate(FAMILIES):
        for row, parametrization in enumerate(("standard", "mup")):
            axis = axes[row][column]
            for width, name, colour in ((BASE, "both", "#9db4d0"), (WIDE, parametrization, "#c2410c")):
                found = rows[f"{family} {width} {name}"]
                powers = [int(rate.removeprefix("2^")) for rate in found["losses"]]
                axis.plot(
                    powers, list(found["losses"].values()), "o-", color=colour, label=f"width {width}", markersize=4
                )
                axis.axvline(found["best"], color=colour, linestyle=":")
            axis.set(title=f"{family.replace('_', '-')}, {parametrization}", ylabel="training loss")
            axis.legend(fontsize=8)
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("log₂ of the learning rate")
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Every run that is not in the file of results, then the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="a plain text, each paragraph a document")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--log2-rates", nargs="*", type=int, default=list(range(-10, -5)))
    parser.add_argument("--parametrizations", nargs="*", default=["both", "standard", "mup"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register()
    found = json.loads(options.results.read_text())["runs"] if options.results.exists() else {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for seed in options.seeds:
            for family in options.families:
                for power in options.log2_rates:
                    for width, parametrization in VARIANTS:
                        name = f"{family} {width} {parametrization} 2^{power} seed {seed}"
                        if name in found or parametrization not in options.parametrizations:
                            continue
                        given = overrides(family, width, parametrization, 2.0**power, seed, options.steps)
                        found[name] = curve(given, options.text)
                        options.results.write_text(json.dumps({"runs": found}, indent=1) + "\n")
                        print(f"{name}: {final(found[name]):.4f}", flush=True)
    rows = table(found)
    settings = {"settings": SETTINGS, "families": FAMILIES, "steps": options.steps}
    options.results.write_text(json.dumps({**settings, "best": rows, "runs": found}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    drawn(rows, PICTURE)


if __name__ == "__main__":
    main()
