"""How long until something happens: `python -m benchmarks.cpu.start_up [train help config mistake]`.

From exec on: to the end of the first optimizer step of the default run with its data prepared, of `--help`, of
`--cfg job`, and of a command line that is refused. CPU seconds beside those of the clock: on a loaded machine only the
former mean anything. What came of it goes to benchmarks/results/start_up.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "start_up.json"
ROUNDS = 3
LINES = {
    "train": ["trainer.max_steps=1", "schedule.warmup_steps=0", "callback.watchdog.floor_s=600"],
    "help": ["--help"],
    "config": ["--cfg", "job"],
    "mistake": ["modle.dim=1"],
}
BARS = {"train": 12.0, "help": 2.0}
# The run's own steps, for as long as the run is not told to say more: the end of the first is in metrics.jsonl.
_FIRST_STEP = ["callback.metrics.every_n_steps=1", "trainer.limit_val_batches=0"]


def start_up(name: str) -> dict[str, Any]:
    """Median of some rounds, seconds: wall, and CPU of the command with what it starts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {**os.environ, "LLM_CACHE_DIR": os.environ.get("LLM_CACHE_DIR", str(folder / "cache"))}
        rounds = []
        if name == "train":
            _once(folder / "warm", name, environment)  # prepares the data
        for number in range(ROUNDS):
            rounds.append(_once(folder / str(number), name, environment))
    wall, cpu = (round(median(column), 2) for column in zip(*rounds, strict=True))
    bar = BARS.get(name)
    judged = {} if bar is None else {"bar": f"< {bar:g} s", "met": wall < bar}
    return {"figure": "seconds", "wall_s": wall, "cpu_s": cpu, "threads": os.cpu_count(), **judged}


def _once(run_dir: Path, name: str, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one command; of training until the line of its first step is written, and to the end."""
    line = [sys.executable, str(ROOT / "train.py"), *LINES[name]]
    line += [f"run_dir={run_dir}", *_FIRST_STEP] if name == "train" else []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stepped: float | None = None
    while name == "train" and command.poll() is None and stepped is None:
        if (run_dir / "metrics.jsonl").exists():
            stepped = time.perf_counter() - start
        time.sleep(0.02)
    code = command.wait()
    if code != (64 if name == "mistake" else 0):
        raise RuntimeError(f"{' '.join(line)}: ended with {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start if stepped is None else stepped, cpu


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(LINES)}; none: all")
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in parser.parse_args().name or LINES:
        kept[name] = start_up(name)
        print(name, json.dumps(kept[name]), flush=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
