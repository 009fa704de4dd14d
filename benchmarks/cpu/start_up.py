"""How long until something happens.

From exec on: to the end of the first optimizer step of the default run with its data prepared, on all cores, of
`--help`, of `--cfg job`, and of a command line that is refused. Of training, CPU seconds are those of all of it: one
step, the samples and the files at its end.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contest import Spread
from benchmarks.measure import Bar, Row, Session

ROOT = Path(__file__).parents[2]
LINES = {
    "train": ["trainer.max_steps=1", "schedule.warmup_steps=0", "callback.watchdog.floor_s=600"],
    "help": ["--help"],
    "config": ["--cfg", "job"],
    "mistake": ["modle.dim=1"],
}
BARS = {"train": Bar("<=", 12.0), "help": Bar("<=", 2.0)}
# The run's own steps, for as long as the run is not told to say more: the end of the first is in metrics.jsonl.
_FIRST_STEP = ["callback.metrics.every_n_steps=1", "trainer.limit_val_batches=0"]


def measure(session: Session) -> list[Row]:
    """Seconds of the clock, and of all cores."""
    rows = []
    environment = {**os.environ, "LLM_CACHE_DIR": str(session.folder / "cache")}
    for name in ["help"] if session.smoke else LINES:
        if name == "train":
            _once(session.folder / "warm", name, environment)  # prepares the data
        told = [_once(session.folder / f"{name}-{n}", name, environment) for n in range(min(session.rounds, 5))]
        wall, cpu = (Spread.of(column) for column in zip(*told, strict=True))
        rows += [Row(f"{name}: wall", "s", wall, BARS.get(name)), Row(f"{name}: all of it", "CPU-s", cpu)]
    return rows


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
