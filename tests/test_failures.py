"""A rank of a training run that is killed, raises or leaves early, under `python train.py` and under torchrun."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.runs import TINY

ROOT = Path(__file__).parents[1]
MARK = "LLM_TEST_FAILURES"  # every process of a job has this variable, with the job's directory as its value
LIMIT_S = 10.0
N_PROCESSES = 5  # the one that was started, two ranks, and a loader worker of each
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = ("LLM_", "SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "GROUP_")

# What rank 1 does, who starts it: exit code, what stderr says, code and rank of exit.json. torchrun's code is always 1,
# and of ours only the rank that remains can speak there.
CASES = {
    ("killed", "python"): (137, "rank 1 (pid {pid}) was killed by SIGKILL", 137, 1),
    ("killed", "torchrun"): (1, "(exitcode: -9) local_rank: 1 (pid: {pid})", 76, 0),
    ("raises", "python"): (70, "rank 1: RuntimeError: boom\nrank 1 failed; its traceback is above", 70, 1),
    ("raises", "torchrun"): (1, "rank 1: RuntimeError: boom", 70, 1),
    ("leaves", "python"): (70, "rank 1 left early with exit code 0, while other ranks were still at work", 70, 1),
    ("leaves", "torchrun"): (1, "rank 0: lost contact with rank 1", 76, 0),
}


class Fail(L.Callback):
    """Ends its own rank at the end of a step, having written down when, and which processes the job has."""

    def __init__(self, how: str, rank: int, step: int, told: str) -> None:
        self.how, self.rank, self.step, self.told = how, rank, step, Path(told)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        pids = processes(os.environ[MARK])
        self.told.write_text(json.dumps({"at": time.monotonic(), "pid": os.getpid(), "pids": pids}))
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raises":
            raise RuntimeError("boom")
        os._exit(0)


@dataclass(frozen=True)
class Job:
    """How a job ended, and what its failing rank had written down."""

    code: int
    stderr: str
    end: dict[str, Any]  # exit.json
    seconds: float  # from the failure to the end of the process that was started
    pid: int
    n_processes: int
    left: list[int]  # who still lives LIMIT_S after the failure


Jobs = dict[tuple[str, str], "Future[Job]"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Jobs]:
    """Two at a time: most of their time is importing, the rest is waiting."""
    directories = {case: tmp_path_factory.mktemp("-".join(case)) for case in CASES}
    pool = ThreadPoolExecutor(2)
    yield {case: pool.submit(run, *case, corpus, directory) for case, directory in directories.items()}
    pool.shutdown(wait=False, cancel_futures=True)
    for directory in directories.values():  # of a test that failed, or was not asked for
        for pid in processes(str(directory)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    pool.shutdown()


def run(how: str, starter: str, corpus: Path, directory: Path) -> Job:
    told = directory / "told"
    overrides = (
        *TINY,
        "strategy=ddp",
        "trainer.devices=2",
        "trainer.max_steps=1000000",
        "trainer.val_check_interval=1000000",
        "data.num_workers=1",
        f"data.path={corpus}",
        f"data.cache_dir={directory / 'cache'}",
        f"run_dir={directory / 'run'}",
        "~callback.sample",
        "~callback.summary",
        f"+callback.fail={{_target_: tests.test_failures.Fail, how: {how}, rank: 1, step: 2, told: {told}}}",
        "packages=[tests]",
    )
    command = [sys.executable, *(TORCHRUN if starter == "torchrun" else ()), str(ROOT / "train.py"), *overrides]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environ |= {MARK: str(directory), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    # Files and no pipes, whose end would wait for every process that is left.
    with (directory / "stdout").open("w") as out, (directory / "stderr").open("w") as err:
        code = subprocess.run(command, env=environ, cwd=directory, stdout=out, stderr=err, timeout=90).returncode
    ended = time.monotonic()
    stderr = (directory / "stderr").read_text()
    assert told.exists(), f"no failure, but an end with {code}\n{stderr}"
    failure = json.loads(told.read_text())
    left = living(str(directory), failure["at"] + LIMIT_S)
    end = json.loads((directory / "run" / "exit.json").read_text())
    return Job(code, stderr, end, ended - failure["at"], failure["pid"], len(failure["pids"]), left)


@pytest.mark.parametrize(("how", "starter"), CASES)
def test_a_rank_that_fails_ends_the_job(jobs: Jobs, how: str, starter: str) -> None:
    job = jobs[how, starter].result()
    print(job.stderr, job.end, f"{job.seconds:.1f} s")  # shown if something is wrong
    code, words, recorded, rank = CASES[how, starter]
    assert job.n_processes == N_PROCESSES
    assert job.seconds <= LIMIT_S
    assert job.left == []
    assert job.code == code
    assert words.format(pid=job.pid) in job.stderr
    assert (job.end["code"], job.end["rank"]) == (recorded, rank)


# ---- who is there ----------------------------------------------------------------------------------------------------
def processes(mark: str) -> list[int]:
    """Those that were started with this mark, or forked from one that was."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if has_mark(pid, mark)]


def has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


def living(mark: str, deadline: float) -> list[int]:
    """Who has this mark at the deadline, or before it if nobody has."""
    for pid in processes(mark):
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            if has_mark(pid, mark):  # still, so that the descriptor is of the process that was found
                select.select([pidfd], [], [], max(0, deadline - time.monotonic()))
            os.close(pidfd)
    return processes(mark)
