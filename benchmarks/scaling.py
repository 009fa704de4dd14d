"""Efficiency from 8 to 16,384 GPUs by the model of llm/plan: `python benchmarks/scaling.py`; seconds.

Fits the one constant of the model to one published run, predicts the others and prints how far off it is; then prints
the tables and writes benchmarks/results/scaling.json and docs/scaling.png. `--measure` (two idle
cores) measures the link between two gloo ranks and the step of one process, predicts the steps of two, and measures
those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scaling_memory import memory_bytes
from llm.model import Transformer, TransformerConfig, config_from
from llm.plan import (
    H100_ETHERNET,
    H100_INFINIBAND,
    Cluster,
    Layout,
    Model,
    step_time,
    tokens_per_s,
    update_s,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
RECORDED = ROOT / "benchmarks" / "results" / "gpu.json"  # of one GPU, by benchmarks/run.py gpu
PICTURE = ROOT / "docs" / "scaling.png"
PEAK = 989e12  # H100 SXM, dense bfloat16
LARGEST_BATCH = 2**24  # tokens: the largest that Llama 3 405B took (arXiv:2407.21783, section 3.4.1)
WORLD_SIZES = [2**n for n in range(3, 15)]
CLUSTERS = {"InfiniBand": H100_INFINIBAND, "Ethernet": H100_ETHERNET}


def model_of(network: Transformer, length: int) -> Model:
    """What the model of a step needs to know of a network."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    return Model(shapes, network.flops_per_token(length))


# ---- against what others measured ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Published:
    """Tokens per second and GPU that somebody measured with fully sharded data parallelism, by number of GPUs."""

    name: str
    config: TransformerConfig
    rows: int
    recompute: bool
    reshard: bool
    speeds: dict[int, float]

    @property
    def base(self) -> int:
        return min(self.speeds)


def _mpt(dim: int, n_layers: int, n_heads: int) -> TransformerConfig:
    """An MPT of such sizes: its parameters, positions and biases aside, within half a per cent of the table's."""
    return TransformerConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        max_length=2048,
        vocab_size=50368,
        norm="layer",
        activation="gelu",
        tie_embeddings=True,
    )


def shipped(name: str) -> TransformerConfig:
    """A model of conf/model."""
    return config_from(yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()))


# mosaicml/llm-foundry scripts/train/benchmarking/README.md at 8c8dd48 (H100 80GB BF16, 2,048 tokens, one micro-batch;
# SHARD_GRAD_OP is reshard=False; gathers in bfloat16, sums in float32) and pytorch/torchtitan
# benchmarks/llama3_h100_202412_torchtitan.md (400 Gb/s a GPU). llm-foundry does not name the network; assumed the same.
PUBLISHED = [
    Published("MPT 7B", _mpt(4096, 32, 32), 6, False, True, {8: 10643, 128: 10475, 256: 10119, 512: 9670}),
    Published("MPT 1B", _mpt(2048, 24, 16), 12, False, False, {128: 44123, 256: 42555, 512: 39837}),
    Published("MPT 3B", _mpt(2560, 32, 20), 8, False, False, {128: 23422, 256: 22772, 512: 21664}),
    Published("MPT 13B", _mpt(5120, 40, 40), 16, True, True, {128: 5080, 256: 4989, 512: 4952}),
    Published("MPT 30B", _mpt(7168, 48, 56), 8, True, True, {128: 2199, 256: 2148, 512: 2115}),
    Published("MPT 70B", _mpt(8192, 80, 64), 8, True, True, {128: 1058, 256: 1035, 512: 1007}),
    Published("Llama 3 8B, compiled", shipped("llama_8b"), 2, False, True, {8: 6667, 128: 6514}),
    Published("Llama 3 8B, eager", shipped("llama_8b"), 2, False, True, {8: 5762, 128: 5605}),
]
INTERFERENCE_FROM = PUBLISHED[0]


@cache
def _model(config: TransformerConfig, length: int) -> Model:
    with torch.device("meta"):
        return model_of(Transformer(config), length)


def compute_that_takes(seconds: float, step: Callable[[float], float]) -> float:
    """The compute of a micro-batch with which `step` gives so many seconds; a second of it costs 0.44 to 1 there."""
    compute_s = seconds
    compute_s, missing = seconds, seconds
    while abs(missing) > 1e-6 * seconds:
        missing = seconds - step(compute_s)
        compute_s += missing
    return compute_s


def predicted(run: Published, cluster: Cluster = H100_INFINIBAND) -> dict[int, float]:
    """Speed at each number of GPUs over that at the smallest, whose measured speed gives the compute."""
    model = _model(run.config, run.config.max_length)
    tokens = run.rows * run.config.max_length

    def seconds(compute_s: float, world_size: int) -> float:
        layout = Layout("fsdp", world_size, reshard_after_forward=run.reshard, micro_batch_tokens=tokens)
        return step_time(model, layout, cluster, compute_s, update_s(model, cluster), run.recompute).seconds

    measured = tokens / run.speeds[run.base]
    compute_s = compute_that_takes(measured, lambda compute_s: seconds(compute_s, run.base))
    return {world_size: measured / seconds(compute_s, world_size) for world_size in run.speeds}


def fitted_interference() -> float:
    """With which the squared error over the three points of MPT 7B is least, to two digits."""

    def error(interference: float) -> float:
        found = predicted(INTERFERENCE_FROM, replace(H100_INFINIBAND, interference=interference))
        base = INTERFERENCE_FROM.speeds[INTERFERENCE_FROM.base]
        return sum((found[n] - speed / base) ** 2 for n, speed in INTERFERENCE_FROM.speeds.items())

    low, high = 0.0, 1.0  # the error has one valley: halve what is around it
    while high - low > 0.002:
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return round((low + high) / 2, 2)


def compare() -> list[dict[str, Any]]:
    """Each published point, with the model's answer and what it would be if hidden communication cost nothing."""
    rows = []
    for run in PUBLISHED:
        with_it, without = predicted(run), predicted(run, replace(H100_INFINIBAND, interference=0.0))
        for n, speed in run.speeds.items():
            if n != run.base:
                values = {"published": speed / run.speeds[run.base], "model": with_it[n], "no interference": without[n]}
                use = "fitted" if run is INTERFERENCE_FROM else "predicted"
                rows.append({"run": run.name, "from": run.base, "gpus": n, "use": use, **values})
    return rows


# ---- the tables ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """A shipped model, rows of a micro-batch, rows of the whole batch, the MFU that somebody measured, and the size of
    benchmarks/gpu that is the same model."""

    name: str
    length: int
    micro_rows: int
    batch_rows: int
    mfu: float
    measured_on: int
    source: str
    recorded: str | None = None


# Batches: conf/experiment; of Llama 3 8B 4 M tokens. Speeds: the best that others published, as `source` says.
SETTINGS = [
    Setting("gpt2_124m", 1024, 32, 512, 0.407, 1, "llm.c, one H100", "124M"),
    Setting("llama_1b", 4096, 4, 512, 0.418, 8, "llm-foundry, its 1.3B, 8 H100"),
    Setting("llama_8b", 8192, 1, 512, 0.39, 8, "torchtitan, 8 H100", "8B"),
]
STRATEGIES = ("ddp", "fsdp", "hsdp")


def layout_of(strategy: str, world_size: int, rows: int, n_micro_batches: int, length: int) -> Layout:
    """HSDP shards within a node."""
    common = {"n_micro_batches": n_micro_batches, "micro_batch_tokens": rows * length}
    if strategy == "ddp":
        return Layout("ddp", world_size, **common)
    return Layout("fsdp", world_size, replicate_size=world_size // 8 if strategy == "hsdp" else 1, **common)


def recorded(size: str | None) -> float | None:
    """Tokens per second of ours on one GPU; None where nobody has measured that."""
    if size is None or not RECORDED.exists():
        return None
    rows = json.loads(RECORDED.read_text()).get("sizes", {}).get("rows", [])
    return next((row["median"] for row in rows if row["case"] == f"{size}: ours"), None)


@cache
def token_s(setting: Setting) -> tuple[float, str]:
    """Seconds of compute of one token on one GPU, and where that is from."""
    model = _model(shipped(setting.name), setting.length)
    mfu, n, source = setting.mfu, setting.measured_on, setting.source
    speed = recorded(setting.recorded)
    if speed is not None:
        mfu, n, source = speed * model.flops_per_token / PEAK, 1, f"measured, {RECORDED.name}"
    tokens = setting.micro_rows * setting.length
    layout = Layout("single", 1, micro_batch_tokens=tokens)
    if n > 1:
        layout = layout_of("fsdp", n, setting.micro_rows, 1, setting.length)
    update = update_s(model, H100_INFINIBAND)
    seconds = tokens * model.flops_per_token / (mfu * PEAK)
    compute = compute_that_takes(seconds, lambda s: step_time(model, layout, H100_INFINIBAND, s, update).seconds)
    return compute / tokens, f"{mfu:.1%} ({source})"


def point(setting: Setting, cluster: Cluster, strategy: str, world_size: int, fixed: bool) -> dict[str, Any]:
    """One cell: `fixed` shares the setting's batch out, else each GPU has a micro-batch and the batch grows."""
    model = _model(shipped(setting.name), setting.length)
    rows = max(1, min(setting.micro_rows, setting.batch_rows // world_size)) if fixed else setting.micro_rows
    n_micro_batches = max(1, setting.batch_rows // (world_size * rows)) if fixed else 1
    layout = layout_of(strategy, world_size, rows, n_micro_batches, setting.length)
    compute_s = token_s(setting)[0] * layout.micro_batch_tokens
    time = step_time(model, layout, cluster, compute_s, update_s(model, cluster))
    needed = memory_bytes(model, layout, logits_at_once=4096)
    too_large = layout.tokens > (setting.batch_rows * setting.length if fixed else LARGEST_BATCH)
    return {
        "model": setting.name,
        "strategy": strategy,
        "gpus": world_size,
        "batch": "fixed" if fixed else "grows",
        "n_micro_batches": n_micro_batches,
        "tokens_per_step": layout.tokens,
        "seconds": time.seconds,
        "exposed_s": time.exposed_s,
        "interference_s": time.interference_s,
        "tokens_per_s": tokens_per_s(layout, time),
        "efficiency": time.efficiency,
        "memory_gb": needed / 1e9,
        "impossible": [
            *(["memory"] if needed > cluster.memory_bytes else []),
            *(["batch"] if too_large else []),
        ],
    }


def points() -> Iterator[dict[str, Any]]:
    """All cells."""
    for network, cluster in CLUSTERS.items():
        for setting in SETTINGS:
            for fixed in (False, True):
                for n in WORLD_SIZES:
                    for strategy in STRATEGIES:
                        yield {"network": network, **point(setting, cluster, strategy, n, fixed)}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Efficiency by GPUs and strategy; m: it does not fit the memory, b: the batch gives each GPU too little."""
    yield "| GPUs | " + " | ".join(STRATEGIES) + " | most tokens/s |"
    yield "|---|" + "---|" * (len(STRATEGIES) + 1)
    for n in WORLD_SIZES:
        here = [row for row in rows if row["gpus"] == n]
        cells = [f"{row['efficiency']:.1%}" + "".join(f" {why[0]}" for why in row["impossible"]) for row in here]
        possible = [row["tokens_per_s"] for row in here if not row["impossible"]]
        yield (
            f"| {n:,} | " + " | ".join(cells) + f" | {max(possible):,.3g} |"
            if possible
            else (f"| {n:,} | " + " | ".join(cells) + " | – |")
        )


def plot(rows: list[dict[str, Any]]) -> None:
    """Efficiency against GPUs, with the published points that the model was held against."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SETTINGS), figsize=(12, 3.6), sharey=True)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for strategy, colour in zip(STRATEGIES, ("tab:orange", "tab:blue", "tab:green"), strict=True):
            for network, style in (("InfiniBand", "-"), ("Ethernet", ":")):
                line = [
                    (row["gpus"], 100 * row["efficiency"])
                    for row in rows
                    if (row["model"], row["strategy"], row["network"], row["batch"])
                    == (setting.name, strategy, network, "grows")
                    and "memory" not in row["impossible"]
                ]
                label = strategy if network == "InfiniBand" else None
                axis.plot(*zip(*line, strict=True) if line else ([], []), style, color=colour, label=label)
        limit = LARGEST_BATCH / (setting.micro_rows * setting.length)
        axis.axvline(limit, color="grey", linewidth=0.8)
        axis.set_title(f"{setting.name}, {setting.micro_rows} x {setting.length} tokens a GPU", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("GPUs (grey: a batch of 16 M tokens)")
        axis.set_ylim(0, 102)
    axes[0].set_ylabel("efficiency, %")
    axes[0].legend(title="InfiniBand; dotted: Ethernet", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Compare, tabulate, write; or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="the link and the steps of one and two ranks here")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved, of --measure")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.measure:
        from benchmarks.scaling_here import measure  # needs the tests' ranks

        results["here"] = measure(arguments.rounds)
    else:
        fitted = fitted_interference()
        print(f"interference fitted to {INTERFERENCE_FROM.name}: {fitted:.2f} (in use: {H100_INFINIBAND.interference})")
        compared = compare()
        for row in compared:
            values = " ".join(f"{key} {row[key]:.1%}" for key in ("published", "model", "no interference"))
            print(f"{row['run']:<22}{row['from']:>4} -> {row['gpus']:>4} GPUs, {row['use']:<9} {values}")
        rows = list(points())
        for network in CLUSTERS:
            for setting in SETTINGS:
                _, source = token_s(setting)
                for batch in ("grows", "fixed"):
                    shape = f"{setting.micro_rows} x {setting.length} tokens a GPU"
                    if batch == "fixed":
                        shape = f"{setting.batch_rows} x {setting.length} tokens in all"
                    print(f"\n{setting.name} on {network}, {shape}, MFU {source}")
                    key = (network, setting.name, batch)
                    print(*table([r for r in rows if (r["network"], r["model"], r["batch"]) == key]), sep="\n")
        plot(rows)
        results |= {"interference": fitted, "published": compared, "points": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
