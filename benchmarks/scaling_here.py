"""The model of a step against two processes on this machine: what `python benchmarks/scaling.py --measure` runs.

Each process is held to a core of its own, with all its threads, so that communication takes its time from the
computation: `interference` is 1, and nothing is fitted but the links. The one process that the prediction starts from
runs twice at once, one on each core, for the two share caches and memory. All is timed by the wall, which is what
counts and needs idle cores, and in CPU seconds of a process, which others on the machine disturb little, and which
communication between two processes of one machine mostly is.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import Callback

from benchmarks.machine import import_path
from benchmarks.scaling import model_of
from benchmarks.strategies import MODEL, RUN
from llm.model import Transformer, TransformerConfig, config_from
from llm.plan import Layout, Transfer, step_time
from llm.tokenizer import Bytes
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
SIZES = (2**14, 2**18, 2**21, 2**24, 2**26)  # bytes of the whole tensor
ROWS = 2  # of 128 tokens, on each process
N_STEPS, N_WARM = 10, 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Seconds = dict[str, dict[str, list[float]]]  # clock -> what -> its figures
STRATEGIES = {"ddp": Layout("ddp", 2, weight_bytes=4), "fsdp": Layout("fsdp", 2, weight_bytes=4)}


def pin(core: int) -> None:
    """Hold every thread that this process has, and will have, to one core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


class Clock(Callback):
    """Pins the process, and writes down the seconds of each step and of the optimizer in it."""

    def __init__(self, folder: str, core: int | None = None) -> None:
        self.folder = folder
        self.core = core
        self.seconds: Seconds = {clock: {"steps": [], "updates": []} for clock in CLOCKS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pin(trainer.global_rank if self.core is None else self.core)

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = now()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.update = now()

    def on_train_batch_end(self, *_: Any) -> None:
        for clock, seconds in now().items():
            self.seconds[clock]["steps"].append(seconds - self.start[clock])
            self.seconds[clock]["updates"].append(seconds - self.update[clock])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (Path(self.folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(self.seconds))


def now() -> dict[str, float]:
    """By each clock."""
    return {clock: read() for clock, read in CLOCKS.items()}


def start(overrides: Sequence[str], folder: Path, core: int | None = None) -> subprocess.Popen[bytes]:
    """A run as a user starts it."""
    folder.mkdir()
    settings = {"data.batch_size": ROWS, "data.micro_batch_size": ROWS, "trainer.max_steps": N_STEPS}
    run = [entry for entry in RUN if entry.partition("=")[0] not in settings]
    run += [f"{key}={value}" for key, value in settings.items()]
    clock = f"+callback.clock={{_target_: benchmarks.scaling_here.Clock, folder: {folder}, core: {core or 0}}}"
    if core is None:
        clock = clock.replace("core: 0", "core: null")
    command = [sys.executable, str(ROOT / "train.py"), *MODEL, *run, f"run_dir={folder / 'run'}", *overrides, clock]
    environment = os.environ | {"PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "packages=[benchmarks]"], env=environment, stdout=subprocess.DEVNULL)


def times(folders: Sequence[Path]) -> Seconds:
    """The median step and update of each process; by the wall of the slower one, in CPU seconds of their mean."""
    ranks = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("rank*.json"))]
    both = {"wall": max, "cpu": statistics.fmean}
    return {
        clock: {
            what: [both[clock]([statistics.median(rank[clock][what][N_WARM:]) for rank in ranks])]
            for what in ("steps", "updates")
        }
        for clock in CLOCKS
    }


def one_round(folder: Path) -> dict[str, Seconds]:
    """One process on each core by itself, then two by each strategy."""
    alone = [folder / "alone0", folder / "alone1"]
    started = [start(["strategy=single"], path, core) for core, path in enumerate(alone)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError("a run failed; its messages are above")
    found = {"single": times(alone)}
    for name in STRATEGIES:
        both = start([f"strategy={name}", "trainer.devices=2", f"data.batch_size={2 * ROWS}"], folder / name)
        if both.wait():
            raise RuntimeError("a run failed; its messages are above")
        found[name] = times([folder / name])
    return found


# ---- the link --------------------------------------------------------------------------------------------------------
def time_collectives(sizes: Sequence[int], repeats: int = 15) -> Seconds:
    """Median seconds of each kind and size, on this rank."""
    rank = dist.get_rank()
    pin(rank)
    found: Seconds = {clock: {kind: [] for kind in ("all_gather", "reduce_scatter", "all_reduce")} for clock in CLOCKS}
    for size in sizes:
        whole = torch.ones(size // 4)
        part = whole[: size // 8].clone()
        calls = {
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
        }
        for kind, call in calls.items():
            taken: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
            for _ in range(repeats):
                dist.barrier()
                begin = now()
                call()
                for clock, end in now().items():
                    taken[clock].append(end - begin[clock])
            for clock, seconds in taken.items():
                found[clock][kind].append(statistics.median(seconds))
    return found


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bytes per second with the least relative squared error of latency + size / bandwidth."""
    target = torch.ones(len(sizes), 1, dtype=torch.float64)
    rows = [[1 / s, n / s] for n, s in zip(sizes, seconds, strict=True)]
    latency, per_byte = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), target).solution.flatten().tolist()
    return max(0.0, latency), 1 / per_byte


@dataclass(frozen=True)
class Here:
    """The links of two processes: kind of collective -> latency, bytes per second."""

    links: dict[str, tuple[float, float]]
    interference: float = 1.0

    def seconds(self, transfer: Transfer, size: int, stride: int) -> float:
        latency, bandwidth = self.links[transfer.kind]
        return transfer.n_calls * latency + transfer.n_bytes / bandwidth


def trained(vocab_size: int) -> TransformerConfig:
    """The model of the runs: conf/model/tiny_decoder.yaml with the settings of MODEL."""
    node = yaml.safe_load((ROOT / "conf" / "model" / "tiny_decoder.yaml").read_text())
    settings = (entry.removeprefix("model.").partition("=") for entry in MODEL)
    node |= {key: yaml.safe_load(value) for key, _, value in settings}
    return config_from(node | {"vocab_size": vocab_size, "max_length": 128})


# ---- together --------------------------------------------------------------------------------------------------------
def measure(n_rounds: int) -> dict[str, Any]:
    """Measure links and steps, predict the steps of two processes from those of one, and print both."""
    rounds, collectives = [], []
    for number in range(n_rounds):
        collectives.append(run_on_ranks(time_collectives, 2, SIZES, timeout_s=300.0)[0])
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder)))
        print(f"round {number + 1} of {n_rounds}", flush=True)
    found = {clock: _compared(clock, rounds, collectives) for clock in CLOCKS}
    load = os.getloadavg()[0]
    return {**found, "machine": f"{platform.machine()}, {os.cpu_count()} cores, gloo, load {load:.1f}", "model": MODEL}


def _compared(clock: str, rounds: list[dict[str, Seconds]], collectives: list[Seconds]) -> dict[str, Any]:
    """By one clock: links, the step of one process, and the steps of two, measured and predicted."""
    seconds = {
        kind: [statistics.median(entry[clock][kind][n] for entry in collectives) for n in range(len(SIZES))]
        for kind in collectives[0][clock]
    }
    links = {kind: fit(SIZES, values) for kind, values in seconds.items()}
    for kind, (latency, bandwidth) in links.items():
        print(f"{clock}: {kind:<15} {1e6 * latency:7.0f} us + {bandwidth / 1e9:.2f} GB/s of the whole tensor")
    with torch.device("meta"):
        model = model_of(Transformer(trained(Bytes().vocab_size)), 128)
    update = statistics.median(entry["single"][clock]["updates"][0] for entry in rounds)
    alone = statistics.median(entry["single"][clock]["steps"][0] for entry in rounds)
    print(f"{clock}: one process {alone:.3f} s a step, of which the optimizer {update:.3f} s")
    steps = {}
    for name, layout in STRATEGIES.items():
        of_rounds = [entry[name][clock]["steps"][0] for entry in rounds]
        measured = statistics.median(of_rounds)
        expected = step_time(model, layout, Here(links), alone - update, update).seconds
        steps[name] = {"measured_s": measured, "predicted_s": expected, "rounds": of_rounds}
        print(
            f"{clock}: {name:<5} measured {measured:.3f} s, predicted {expected:.3f} s ({expected / measured - 1:+.1%})"
        )
    return {"links": links, "single_s": alone, "update_s": update, "steps": steps}
