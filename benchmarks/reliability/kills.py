"""SIGKILLs at random instants:
`python benchmarks/reliability/kills.py --trials 200 --ranks 1 [--in-save] [--kills 20]`.

A trial is a small run (dropout, several micro-batches, a checkpoint every third step) of which all processes, or one,
are killed; the same command again then brings it to its end. Wanted: weights, optimizer and the account of the ledger
are those of a run that nothing disturbed, to the byte. Processes are forked from this one, which has imported all.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from record import record

from llm import ledger
from llm.audit import check
from llm.checkpoint import newest
from tests.runs import run_composed, saved

N_STEPS = 20
STEPS_A_KILL = 7  # in runs that are killed more than once: so that the last kill comes before the end
_GRACE_S = 10.0  # a launcher's: ranks that wait for one that is gone are then killed, too
_PATIENCE_S = 120.0


class Trials:
    """Runs of one shape, in a folder of their own."""

    def __init__(self, folder: Path, n_ranks: int, draw: random.Random, n_steps: int = N_STEPS) -> None:
        self.folder, self.n_ranks, self.draw, self.n_steps = folder, n_ranks, draw, n_steps
        words = [f"word{n}" for n in range(50)]
        texts = (" ".join(draw.choices(words, k=30)) for _ in range(100))
        (folder / "text.txt").write_text("\n\n".join(texts))
        self.duration = 0.0
        self.reference = folder / "reference"

    def settings(self, run_dir: Path) -> list[str]:
        """Of one run."""
        return [
            f"data.path={self.folder / 'text.txt'}",
            "++data.sources=null",
            f"data.cache_dir={self.folder / 'cache'}",
            f"run_dir={run_dir}",
            "data.micro_batch_size=2",
            f"trainer.max_steps={self.n_steps}",
            "trainer.val_check_interval=9",
            "callback.ledger.every_n_steps=2",
            "callback.checkpoint.every_n_train_steps=3",
            "data.val_every=null",
            "~callback.sample",
            "~callback.summary",
            *([] if self.n_ranks == 1 else ["strategy=ddp", f"trainer.devices={self.n_ranks}"]),
        ]

    def make_reference(self) -> None:
        """The run that nothing disturbs; the first fills the cache, the second is timed, for a run of N_STEPS."""
        for name in ("first", "reference"):
            started, run_dir = time.monotonic(), self.folder / name
            children = self.start(run_dir)
            while not (run_dir / ledger.NAME).exists():
                time.sleep(0.005)
            start_up = time.monotonic() - started
            assert self.wait(children) == [0] * self.n_ranks
            steps = time.monotonic() - started - start_up
            self.duration = start_up + steps * N_STEPS / self.n_steps

    def start(self, run_dir: Path) -> list[int]:
        """Fork the processes of a run."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        return [self._fork(run_dir, rank, port) for rank in range(self.n_ranks)]

    def _fork(self, run_dir: Path, rank: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if self.n_ranks > 1:
                sizes = {"WORLD_SIZE": self.n_ranks, "LOCAL_WORLD_SIZE": self.n_ranks}
                place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes}
                os.environ |= {name: str(value) for name, value in place.items()}
            self.run(run_dir)
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            os._exit(code)

    def run(self, run_dir: Path) -> None:
        """What each process does."""
        run_composed(self.settings(run_dir))

    def kill(self, children: list[int], run_dir: Path, *, in_save: bool) -> None:
        """After a random while, or a moment after a save began: all processes, or one of them."""
        if in_save:
            seen, deadline = self.draw.randrange(1, N_STEPS // 3), time.monotonic() + 2 * self.duration
            while seen and time.monotonic() < deadline:
                if any((run_dir / "checkpoints").glob(".step-*")):
                    seen -= 1
                    while seen and any((run_dir / "checkpoints").glob(".step-*")):
                        pass
            time.sleep(self.draw.random() * 0.006)
        else:
            time.sleep(self.draw.random() * self.duration)
        for child in children if self.draw.random() < 0.5 else [self.draw.choice(children)]:
            os.kill(child, signal.SIGKILL)

    def wait(self, children: list[int], patience_s: float = _PATIENCE_S) -> list[int]:
        """Their exit codes; those that do not come to an end in time are killed."""
        codes, deadline = {}, time.monotonic() + patience_s
        while len(codes) < len(children):
            for child in children:
                if child not in codes:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        codes[child] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > deadline:
                        with suppress(ProcessLookupError):
                            os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        return [codes[child] for child in children]

    def differences(self, run_dir: Path) -> list[str]:
        """What is not as in the reference, to the byte."""
        found = []
        one, two = saved(self.reference), saved(run_dir)
        for kind in ("state_dict", "optimizer"):
            same = one[kind].keys() == two[kind].keys() and all(
                torch.equal(value, two[kind][name]) for name, value in one[kind].items()
            )
            found += [] if same else [kind]
        accounts = [ledger.read(folder) for folder in (self.reference, run_dir)]
        lines = [[(n, s["samples"], s["loss"]) for n, s in sorted(account.steps.items())] for account in accounts]
        found += [] if lines[0] == lines[1] else ["ledger"]
        return found + ([] if check(run_dir)[1] else ["audit"])


def landed(run_dir: Path, n_steps: int) -> str:
    """Where in the life of the run it was killed."""
    if any((run_dir / "checkpoints").glob(".step-*")):
        return "in a save"
    step = newest(run_dir)
    if step is None:
        return "before the first checkpoint" if (run_dir / ledger.NAME).exists() else "before the first step"
    return "at its end" if step.name.endswith(f"{n_steps:08d}") else "in training"


def main() -> None:
    """So many trials of one shape."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=1, help="in each trial")
    parser.add_argument("--in-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    outlived = 0
    with tempfile.TemporaryDirectory() as scratch:
        n_steps = max(N_STEPS, STEPS_A_KILL * options.kills)
        trials = Trials(Path(scratch), options.ranks, random.Random(0), n_steps)
        trials.make_reference()
        for _ in range(options.trials):
            run_dir = Path(scratch) / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
            for _ in range(options.kills):
                children = trials.start(run_dir)
                trials.kill(children, run_dir, in_save=options.in_save)
                began = time.monotonic()
                trials.wait(children, _GRACE_S)
                outlived += time.monotonic() - began > _GRACE_S
                where[landed(run_dir, n_steps)] += 1
            if trials.wait(trials.start(run_dir)) != [0] * options.ranks:
                wrong["did not go on"] += 1
                continue
            wrong.update(trials.differences(run_dir))
    name = f"SIGKILL, {options.ranks} ranks, {'in the save' if options.in_save else 'any time'}, {options.kills} a run"
    record(
        name,
        {
            "trials": options.trials,
            "landed": dict(where),
            "differing": dict(wrong),
            "a rank outlived the other by 10 s": outlived,
        },
    )


if __name__ == "__main__":
    main()
