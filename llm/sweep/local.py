"""The jobs of a sweep on this machine, some at a time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from llm.config.mistake import ConfigError, line
from llm.launch import die_with_parent, program, signal_numbers
from llm.signals import TOLD, preempted
from llm.submit.record import Job
from llm.sweep.launcher import End, Processes, last_line

_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU


@dataclass(frozen=True)
class _Running:
    """A job at work in one of the places that there are for jobs."""

    job: Job
    place: int
    process: subprocess.Popen[bytes]
    log: Path


class Local(Processes):
    """Start `train.py` for each job, which starts its ranks; what it prints goes to SWEEP/log-NUMBER.txt.

    Signals are passed on: jobs that are told to go save and leave, none is started any more, and this process leaves as
    they do. If it is killed, they are.

    Args:
        metric: what a job gives, by its name in summary.json.
        n_jobs: at once; each gets its share of the cores.
        gpus_per_job: each sees so many, those that no other job has; null: all of them.
    """

    def __init__(
        self, metric: str, n_jobs: Annotated[int, Ge(1)] = 1, gpus_per_job: Annotated[int, Ge(1)] | None = None
    ) -> None:
        super().__init__(metric, n_jobs)
        self.gpus_per_job = gpus_per_job

    def start(self, jobs: Sequence[Job]) -> None:
        """Keep `n_jobs` at work until there are none left."""
        waiting, running, told = list(jobs), dict[int, _Running](), None
        environments = [self._environment(place) for place in range(self.n_jobs)]
        with signal_numbers() as numbers:
            try:
                while running or (waiting and told is None):
                    while waiting and told is None and len(running) < self.n_jobs:
                        place = next(n for n in range(self.n_jobs) if n not in running)
                        running[place] = self._started(waiting.pop(0), place, environments[place])
                    for number in numbers.recv(4096):
                        if number == signal.SIGCHLD:
                            self._collect(running)
                            continue
                        if number != signal.SIGQUIT:  # at which jobs show their stacks
                            told = told or signal.Signals(number)
                        for one in running.values():
                            one.process.send_signal(number)
            finally:
                for one in running.values():
                    one.process.kill()  # and with it, its ranks
                    one.process.wait()
        if told is not None:
            raise preempted(f"the jobs have left, {len(waiting)} were not started; the same command goes on", told)

    def _started(self, job: Job, place: int, environment: dict[str, str]) -> _Running:
        log = self.folder / f"log-{job.number}.txt"
        command = [*program(), *self.arguments(job)]
        self.begun(job, log)
        cores = _share(sorted(os.sched_getaffinity(0)), place, self.n_jobs)

        def before() -> None:
            die_with_parent()
            os.sched_setaffinity(0, cores)

        # A signal that comes before the job can deal with it waits until it can: `signals.listen`.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C of a terminal reaches this process only
                    preexec_fn=before,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return _Running(job, place, process, log)

    def _collect(self, running: dict[int, _Running]) -> None:
        for place, one in list(running.items()):
            code = one.process.poll()
            if code is not None:
                del running[place]
                self.over(one.job, End(code if code >= 0 else 128 - code, last_line(one.log) if code else ""))

    def _environment(self, place: int) -> dict[str, str]:
        """Of the jobs in one place."""
        environment = {name: value for name, value in os.environ.items() if name != "LLM_RUN_ID"}
        environment["PYTHONUNBUFFERED"] = "1"  # the log says a line when it is written
        if self.gpus_per_job is not None:
            first = place * self.gpus_per_job
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus()[first : first + self.gpus_per_job])
        return environment

    def _gpus(self) -> list[str]:
        """The ids of those that this process may use, of which each place has some."""
        wanted = self.n_jobs * (self.gpus_per_job or 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            there, has = [word for word in visible.split(",") if word], f"CUDA_VISIBLE_DEVICES={visible}"
        else:  # without its driver's list nobody knows how many there are before torch is loaded
            n_gpus = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else wanted
            there, has = [str(n) for n in range(n_gpus)], f"this machine has {n_gpus}"
        if len(there) < wanted:
            rule = f"{self.n_jobs} jobs at once take {wanted} GPUs, and {has}"
            raise ConfigError([line("hydra.launcher.gpus_per_job", str(self.gpus_per_job), rule, "lower one of them")])
        return there


def _share(cores: list[int], place: int, n_places: int) -> list[int]:
    """Neighbouring cores for one of the places; where there are fewer than places, some have the same."""
    first, after = (len(cores) * n // n_places for n in (place, place + 1))
    return cores[first:after] or [cores[first % len(cores)]]
