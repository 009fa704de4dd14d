"""What a real SLURM does to runs, at length: `python -m benchmarks.reliability.cluster`, as root, for half an hour.

Each trial interrupts a run of 2 nodes x 2 ranks (or as its name says) and compares what it leaves with what an
uninterrupted one left: the ledger, the losses and the weights, to the bit. tests/cluster/box.py is the cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.record import record
from tests.cluster.box import PACED, TINY, Box, cpu, ledger, lines, losses, weights, why_not

N_STEPS = 160
RUN = [*TINY, f"trainer.max_steps={N_STEPS}", "strategy=ddp"]
PATIENCE_S = 240


def same(run_dir: Path, reference: Path) -> bool:
    """To the bit, each step once."""
    steps = [row["step"] for row in lines(run_dir / "metrics.jsonl") if row.get("train/loss") is not None]
    equal = [of(run_dir) == of(reference) for of in (ledger, losses, weights)]
    return all(equal) and steps == list(range(1, N_STEPS + 1))


def lost(box: Box, name: str) -> int:
    """Steps that were done again, over all attempts."""
    done = [row["step"] for row in lines(box.run_dir(name) / "ledger.jsonl") if "event" not in row]
    return len(done) - len(set(done))


def interrupted(box: Box, name: str, times: int, fault: Callable[[str], object], *overrides: str) -> dict[str, Any]:
    """Have `fault` interrupt one run so often."""
    job = box.submit(*cpu(2, 2), *RUN, *PACED, *overrides, f"run_name={name}")
    log = box.run_dir(name) / "jobs/train/log.txt"
    for number in range(times):
        box.reaches(name, box.step(name) + 3, PATIENCE_S)
        fault(job)
        box.wait(f"restart {number + 1}", lambda number=number: box.restarts(job) > number, PATIENCE_S, log)  # type: ignore[misc]
    state = box.ended(job, PATIENCE_S, log)
    equal = same(box.run_dir(name), box.run_dir("reference"))
    return {"interruptions": box.restarts(job), "state": state, "equal": equal, "steps done again": lost(box, name)}


def power_loss(box: Box, job: str) -> None:
    """Of a node of the job, which comes back when it has been missed."""
    before = box.restarts(job)
    box.box("kill-node", "n2")
    box.wait("the loss of n2", lambda: box.restarts(job) > before, PATIENCE_S)
    box.box("start-node", "n2")


def cut(box: Box, job: str) -> None:
    """A cable, until SLURM has given the node up."""
    before = box.restarts(job)
    box.box("cut", "n2")
    box.wait("the loss of n2", lambda: box.restarts(job) > before, PATIENCE_S)
    box.box("heal", "n2")


def preempted(box: Box, job: str) -> None:
    """By a job of a partition that comes first."""
    other = box.sbatch("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    box.ended(other, PATIENCE_S)


def cable(box: Box) -> dict[str, Any]:
    """Pulled for four seconds: the run goes on."""
    job = box.submit(*cpu(2, 2), *RUN, *PACED, "run_name=cable")
    box.reaches("cable", 5, PATIENCE_S)
    box.box("cut", "n2")
    time.sleep(4)
    box.box("heal", "n2")
    state = box.ended(job, PATIENCE_S)
    return {
        "state": state,
        "restarts": box.restarts(job),
        "equal": same(box.run_dir("cable"), box.run_dir("reference")),
    }


def stuck(box: Box) -> dict[str, Any]:
    """A run that loses a rank before it has saved anything, every time."""
    (box.site / "doomed.py").write_text(
        "import os, signal\nfrom lightning.pytorch.callbacks import Callback\n\n\n"
        "class Doomed(Callback):\n    def on_train_batch_end(self, trainer, *arguments):\n"
        "        if trainer.global_step == 3 and trainer.global_rank == 3:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    doomed = ["packages=[doomed]", "+callback.doomed={_target_: doomed.Doomed}"]
    job = box.submit(*cpu(2, 2), *RUN, *doomed, "run_name=stuck")
    state = box.ended(job, 2 * PATIENCE_S)
    end = lines(box.run_dir("stuck") / "attempts.jsonl")
    log = (box.run_dir("stuck") / "jobs/train/log.txt").read_text()
    return {
        "state": state,
        "attempts": sum(row["event"] == "begin" for row in end),
        "codes": [row["code"] for row in end if row["event"] == "end"],
        "said": "times and came no further" in log,
    }


def unreachable(box: Box) -> dict[str, Any]:
    """A first host that nobody has."""
    job = box.sbatch(
        "--export=ALL,MASTER_ADDR=10.77.0.99", "--nodes=2", "--ntasks-per-node=1", "slurm/train.sbatch", *RUN
    )
    log = box.site / f"slurm-{job}.log"
    box.wait("what is said", lambda: log.exists() and "did not arrive" in log.read_text(), PATIENCE_S, log)
    told = next(text for text in log.read_text().splitlines() if "did not arrive" in text)
    box.exec("scancel", job)
    box.ended(job, PATIENCE_S)
    return {"said": told}


def elsewhere(box: Box) -> dict[str, Any]:
    """2 nodes, then 1, then 2: near, as sums of other numbers of ranks round otherwise."""
    for nodes, until in ((2, 20), (1, 50), (2, None)):
        job = box.submit(*cpu(nodes, 2), *RUN, *PACED, "run_name=elsewhere")
        if until is not None:
            box.reaches("elsewhere", until, PATIENCE_S)
            box.llm("cancel", "elsewhere")
        state = box.ended(job, PATIENCE_S)
    found, wanted = losses(box.run_dir("elsewhere")), losses(box.run_dir("reference"))
    far = max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))
    return {
        "state": state,
        "world sizes": [row["world_size"] for row in box.attempts("elsewhere")],
        "loss": f"{far:.1e}",
    }


def trials(box: Box) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that can be tried, by name."""
    limit = ("cluster.time=0:01:00", "cluster.warning_s=10")
    kept = "cluster.options.no-kill=true"
    return {
        "warned": lambda: interrupted(box, "warned", 20, lambda job: box.exec("scancel", "--signal=USR1", job)),
        "warned, ranks and batch shell": lambda: interrupted(
            box, "both", 2, lambda job: box.exec("scancel", "--signal=USR1", "--full", job)
        ),
        "time limit": lambda: interrupted(box, "limit", 1, lambda job: None, *limit),
        "requeued": lambda: interrupted(box, "requeued", 2, lambda job: box.exec("scontrol", "requeue", job)),
        "preempted": lambda: interrupted(box, "preempted", 2, lambda job: preempted(box, job)),
        "power loss": lambda: interrupted(box, "power", 2, lambda job: power_loss(box, job)),
        "power loss, --no-kill": lambda: interrupted(box, "nokill", 1, lambda job: power_loss(box, job), f"+{kept}"),
        "cable cut until the node is down": lambda: interrupted(box, "cut", 1, lambda job: cut(box, job)),
        "cable cut for 4 s": lambda: cable(box),
        "another number of nodes": lambda: elsewhere(box),
        "no progress": lambda: stuck(box),
        "first host unreachable": lambda: unreachable(box),
    }


def main() -> None:
    """One after the other; a trial that fails is a result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="these trials")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"benchmarks/reliability/cluster.py: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder))
        try:
            box.up(3)
            job = box.submit(*cpu(2, 2), *RUN, "run_name=reference")
            assert box.ended(job, PATIENCE_S) == "COMPLETED"
            for name, trial in trials(box).items():
                if options.only and name not in options.only:
                    continue
                started = time.monotonic()
                try:
                    found = trial()
                except AssertionError as error:
                    found = {"failed": str(error)[-2000:]}
                record(f"slurm, {name}", found | {"seconds": round(time.monotonic() - started)})
                print(json.dumps(found), flush=True)
        finally:
            box.down()


if __name__ == "__main__":
    main()
