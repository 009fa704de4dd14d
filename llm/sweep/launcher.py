"""What the launchers share: a sweep has a folder, a job a number in it, and what is done is not done again."""

from __future__ import annotations

import re
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from llm.config.command_line import quoted
from llm.config.mistake import ConfigError, line
from llm.exit import guarded
from llm.launch import arguments_of_job, place
from llm.signals import raise_at_once
from llm.study import finite
from llm.submit.record import Job, Record
from llm.sweep.outcome import Outcome, outcome
from llm.sweep.table import short


@dataclass(frozen=True)
class End:
    """How the processes of a job ended: an exit code, None if nobody knows, and what can be said beside it."""

    code: int | None
    cause: str = ""


class Processes(Launcher):
    """A Hydra launcher whose jobs are runs with processes of their own, in SWEEP/0, SWEEP/1, …: SWEEP is the run_dir of
    the command line.

    The same command goes on with a sweep: what is done is read, the rest continues from its checkpoints. A job that
    fails ends no other.
    """

    def __init__(self, metric: str, n_jobs: int) -> None:
        self.metric = metric
        self.n_jobs = n_jobs
        self.direction = "minimize"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Where the sweep is, and what is swept."""
        self.config = config
        self.loader = hydra_context.config_loader
        self.folder, self.name = Path(str(config.run_dir)), str(config.run_name)
        self.record = Record(self.folder)
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self.swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a sweeper's batch. A job that failed returns NaN: sweepers take an exception for the end of all."""
        with guarded():
            found = self.run([Job(initial_job_idx + n, list(words)) for n, words in enumerate(job_overrides)])
        returns = []
        for job, words in zip(found, job_overrides, strict=True):
            value = job.metric if job.done else float("nan")
            returns.append(JobReturn(overrides=list(words), status=JobStatus.COMPLETED, _return_value=value))
        return returns

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Bring jobs to their end, each unless it is there, and say how.

        Raises:
            ConfigError: if one was another job before.
            PreemptedError: if this process was told to go.
        """
        raise_at_once()  # until processes are started there is nothing to be told
        self._alone()
        self.record.enter(jobs)
        self.record.about(self.metric, self.direction)
        before = [self.outcome(job) for job in jobs]
        if done := [found for found in before if found.done]:
            self.say(f"{len(done)} of {len(jobs)} jobs are done already")
        if open_ones := [job for job, found in zip(jobs, before, strict=True) if not found.done]:
            self.start(open_ones)
        return [self.outcome(job) for job in jobs]

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> None:
        """Run jobs to their ends; each is told by `begun` and `over`."""

    def begun(self, job: Job, log: Path, what: str = "started") -> None:
        """A job begins: on the record, and on the terminal."""
        self.record.started(job, log)
        pairs = [text.partition("=") for text in job.overrides]
        shown = " ".join(f"{key}={short(value)}" for key, _, value in pairs if key in self.swept)
        self.say(f"{self.name}/{job.number} {what}: {shown} (log: {log})")

    def over(self, job: Job, end: End) -> None:
        """A job has ended."""
        self.record.ended(job.number, end.code, end.cause)
        found = self.outcome(job)
        result = f"{self.metric} {found.metric:.6g}" if finite(found.metric) else ""
        code = f"{found.code}" if found.code else ""
        self.say(f"{self.name}/{job.number} {': '.join(filter(None, (found.status, code, found.note or result)))}")

    def outcome(self, job: Job) -> Outcome:
        """How a job is, as its directory and the record have it."""
        return outcome(self.folder, self.record.read().jobs[job.number], self.metric)

    def arguments(self, job: Job) -> list[str]:
        """The command line of a job's train.py: that of the sweep, with the job's values, its name and its place."""
        hydra = list(self.config.hydra.overrides.hydra)
        own = [text for text in job.overrides if not re.match(r"\+*(run_name|run_dir)=", text)]
        name = f"{self.name}/{job.number}"
        where = [f"run_name={quoted(name)}"]
        plain = OmegaConf.merge(self.config, {"run_name": name})
        if str(plain.run_dir) != f"{self.folder}/{job.number}":  # the user's own, which does not follow from the name
            where.append(f"run_dir={quoted(f'{self.folder}/{job.number}')}")
        return [*arguments_of_job(sys.argv[1:], hydra, job.number, own), *where]

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _alone(self) -> None:
        here = place()
        if here.world_size > 1:
            rule = f"one of the {here.world_size} processes of {here.launcher} cannot be many runs"
            raise ConfigError([line("-m", "", rule, "python train.py -m … starts processes for each")])


def last_line(log: Path) -> str:
    """What a job said last: of a mistake in its command line, the mistake. What batch scripts say is not the job's."""
    try:
        text = log.read_bytes()[-4096:].decode(errors="replace")
    except OSError:
        return ""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.startswith(("== ", "srun: ", "slurmstepd: "))
    ]
    return lines[-1].strip() if lines else ""
