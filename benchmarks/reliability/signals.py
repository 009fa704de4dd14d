"""Signals at random instants: `python benchmarks/reliability/signals.py --trials 100 --ranks 1`.

A trial is a small run, of which all processes, or one, are sent SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP, once or twice, at
any time from their start to their exit. Wanted: all leave with 75, the newest checkpoint is that of the last step made,
and the same command brings the run to the end of one that nothing disturbed, to the byte. A run that had said that it
is done before it was told leaves with 0, and is counted apart.
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
from contextlib import suppress
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from kills import N_STEPS, Trials
from record import record

from llm import ledger, signals
from llm.checkpoint import newest
from llm.config import register
from llm.exit import SAVED
from llm.run import main as run_main
from tests.runs import CONF, TINY


class Told(Trials):
    """Runs as train.py starts them: with what it does about signals, and with its exit codes."""

    def start(self, run_dir: Path) -> list[int]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.TOLD)  # as the launcher does
        try:
            return super().start(run_dir)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, run_dir: Path) -> None:
        signals.listen()
        register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*TINY, "run_name=test", *self.settings(run_dir)])
        run_main(cfg)

    def tell(self, children: list[int]) -> str:
        """At any time; gives which signal."""
        time.sleep(self.draw.random() * self.duration)
        number = self.draw.choice(signals.TOLD)
        told = children if self.draw.random() < 0.5 else [self.draw.choice(children)]
        for _ in range(self.draw.choice([1, 1, 2])):
            for child in told:
                with suppress(ProcessLookupError):
                    os.kill(child, number)
        return number.name


def ended(run_dir: Path) -> bool:
    """Whether the run is on record as done."""
    with suppress(OSError, ValueError):
        return json.loads((run_dir / "exit.json").read_text())["code"] == 0
    return False


def moment(run_dir: Path) -> str:
    """Where in its life the run was told."""
    step = newest(run_dir)
    if step is None:
        return "before the first step"
    return "after the last step" if step.name.endswith(f"{N_STEPS:08d}") else "in training"


def lost(run_dir: Path) -> int:
    """Steps that were made, and are in no checkpoint."""
    if not (run_dir / ledger.NAME).exists():
        return 0
    made, step = max(ledger.read(run_dir).steps, default=0), newest(run_dir)
    return made - (0 if step is None else int(step.name.removeprefix("step-")))


def main() -> None:
    """So many signals."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    where: Counter[str] = Counter()
    which: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    n_told = n_ended = n_lost = 0
    with tempfile.TemporaryDirectory() as scratch:
        trials = Told(Path(scratch), options.ranks, random.Random(0))
        trials.make_reference()
        while n_told < options.trials:
            run_dir = Path(scratch) / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
            children = trials.start(run_dir)
            name = trials.tell(children)
            codes = trials.wait(children)
            if codes == [0] * options.ranks and ended(run_dir):
                n_ended += 1
                continue
            n_told += 1
            which[name] += 1
            where[moment(run_dir)] += 1
            n_lost += lost(run_dir)
            if codes != [SAVED] * options.ranks:
                wrong[f"left with {codes}"] += 1
            if trials.wait(trials.start(run_dir)) != [0] * options.ranks:
                wrong["did not go on"] += 1
                continue
            wrong.update(trials.differences(run_dir))
    figures = {"landed": dict(where), "signals": dict(which), "wrong": dict(wrong), "steps lost": n_lost}
    record(f"signals, {options.ranks} ranks", {"trials": n_told, **figures, "told after the end, left with 0": n_ended})


if __name__ == "__main__":
    main()
