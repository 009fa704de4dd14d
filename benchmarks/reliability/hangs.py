"""Hung ranks, and runs that only look hung:
`python benchmarks/reliability/hangs.py --trials 10` and `… --quiet 200`.

A trial is a run of two ranks of which one hangs for good, in one of five ways, with the watchdog's limit at 5 s.
Wanted: the run is ended and that rank is named. A quiet run has a validation, a save or a first step that takes longer
than the limit, or is suspended for longer, and goes on. Wanted: nobody interferes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from kills import Trials
from lightning.pytorch.callbacks import Callback
from record import record

from tests.test_watch import Hang

LIMIT_S = 5.0
QUIET_S = 2.0  # the limit of quiet runs, in which the long thing takes half as long again
AT_ONCE = 4
WAYS = ("loop", "gil", "stopped", "fifo", "collective")
LONG = ("validation", "save", "first_step", "suspended")


class TimedHang(Hang):
    """Says when it began."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            (Path(trainer.default_root_dir) / "began").write_text(str(time.time()))
        super().on_train_batch_start(trainer, pl_module, *arguments)  # type: ignore[arg-type]


class Long(Callback):
    """Something that takes longer than a step may."""

    def __init__(self, what: str) -> None:
        self.what = what

    def wait(self, what: str, trainer: L.Trainer) -> None:
        if what == self.what:
            time.sleep(1.5 * QUIET_S)

    def on_validation_batch_start(self, trainer: L.Trainer, *arguments: object) -> None:
        self.wait("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *arguments: object) -> None:
        if trainer.global_step == 9:
            self.wait("save", trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: object) -> None:
        if trainer.global_step == 0:
            self.wait("first_step", trainer)
        if trainer.global_step == 5 and self.what == "suspended":
            (Path(trainer.default_root_dir) / "ready").touch()
            while not (Path(trainer.default_root_dir) / "continued").exists():
                time.sleep(0.01)


class Watched(Trials):
    """Runs with a watchdog, and with a callback of these."""

    limit_s, callback = LIMIT_S, ""

    def settings(self, run_dir: Path) -> list[str]:
        watchdog = f"{{_target_: llm.callback.Watchdog, floor_s: {self.limit_s}, factor: 2.0}}"
        extra = [f"+callback.extra={self.callback}", "packages=[hangs]"] if self.callback else []
        documents = self.folder / "documents.jsonl"
        texts = (self.folder / "text.txt").read_text().split("\n\n")
        documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return [
            *super().settings(run_dir),
            f"data.path={documents}",
            "data.val_every=20",
            f"+callback.watchdog={watchdog}",
            *extra,
        ]


def hang(trials: Watched, run_dir: Path, way: str) -> tuple[float, bool]:
    """Seconds until the rank was named, and whether it was the right one, with its stack and code 76. Of a rank that is
    in another collective than the others, all that can be said is that they wait for each other."""
    trials.callback = f"{{_target_: hangs.TimedHang, how: {way}}}"
    shutil.rmtree(run_dir, ignore_errors=True)
    trials.wait(trials.start(run_dir))
    took_s = (run_dir / "hang.txt").stat().st_mtime - float((run_dir / "began").read_text())
    end = json.loads((run_dir / "exit.json").read_text())
    stack = (run_dir / "hang.txt").read_text().partition("==== stacks of rank 1")[2]
    named = "all ranks wait in collectives" in end["cause"] if way == "collective" else end["rank"] == 1
    return took_s, end["code"] == 76 and named and f"in {way}" in stack


def quiet(trials: Watched, run_dirs: list[Path], what: str) -> int:
    """How many of so many runs at once were interfered with."""
    trials.callback = f"{{_target_: hangs.Long, what: {what}}}"
    children = {}
    for run_dir in run_dirs:
        shutil.rmtree(run_dir, ignore_errors=True)
        children[run_dir] = trials.start(run_dir)
    if what == "suspended":
        for run_dir, ranks in children.items():
            while not (run_dir / "ready").exists():
                time.sleep(0.01)
            for child in ranks:
                os.kill(child, signal.SIGSTOP)
        time.sleep(1.5 * QUIET_S)
        for run_dir, ranks in children.items():
            (run_dir / "continued").touch()
            for child in ranks:
                os.kill(child, signal.SIGCONT)
    codes = [trials.wait(ranks) for ranks in children.values()]
    return sum(code != [0] or (run_dir / "hang.txt").exists() for code, run_dir in zip(codes, run_dirs, strict=True))


def main() -> None:
    """Hangs, or quiet runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=0, help="of each way to hang")
    parser.add_argument("--quiet", type=int, default=0, help="runs that only look hung")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.trials:
            trials = Watched(Path(scratch), 2, random.Random(0))
            results = {way: [hang(trials, Path(scratch) / "run", way) for _ in range(options.trials)] for way in WAYS}
            slowest = {way: round(max(took_s for took_s, _ in found), 2) for way, found in results.items()}
            wrong = {way: sum(not right for _, right in found) for way, found in results.items()}
            record(
                "hangs, 2 ranks",
                {"limit_s": LIMIT_S, "trials of each": options.trials, "slowest": slowest, "wrong": wrong},
            )
        if options.quiet:
            trials = Watched(Path(scratch), 1, random.Random(0))
            trials.make_reference()
            trials.limit_s = QUIET_S
            runs: Counter[str] = Counter()
            alarms: Counter[str] = Counter()
            run_dirs = [Path(scratch) / f"run{n}" for n in range(AT_ONCE)]
            while runs.total() < options.quiet:
                what = LONG[runs.total() // AT_ONCE % len(LONG)]
                alarms[what] += quiet(trials, run_dirs, what)
                runs[what] += AT_ONCE
            record("false alarms", {"limit_s": QUIET_S, "runs": dict(runs), "alarms": dict(alarms)})


if __name__ == "__main__":
    main()
