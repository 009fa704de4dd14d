"""The jobs of a sweep as tasks of a SLURM array."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt
from omegaconf import open_dict

from llm.launch import signal_numbers
from llm.signals import preempted
from llm.submit.record import Job
from llm.sweep.launcher import End, Processes, last_line

if TYPE_CHECKING:
    from llm.cluster.jobs import State

_ASKS = 3  # so often in a row SLURM knows nothing of a task before it is taken to have ended


class Slurm(Processes):
    """Check the jobs, freeze the code, and submit them as one array, by `cluster`; wait for its tasks.

    A task that is preempted, or loses its node, is queued again by its own batch shell, and is no less waited for. If
    this process ends, the tasks go on; started again it waits for those that are in the queue or at work.

    Args:
        metric: what a job gives, by its name in summary.json.
        n_jobs: at once.
        poll_s: how often SLURM is asked.
    """

    def __init__(self, metric: str, n_jobs: Annotated[int, Ge(1)] = 8, poll_s: Annotated[float, Gt(0)] = 10.0) -> None:
        super().__init__(metric, n_jobs)
        self.poll_s = poll_s

    def start(self, jobs: Sequence[Job]) -> None:
        """Submit those that are not there, and wait until no task is live."""
        by_number = {job.number: job for job in jobs}
        waiting = {number: where for number, where in self._live().items() if number in by_number}
        for number, (array, folder) in waiting.items():
            self.begun(by_number[number], folder / f"log-{number}.txt", f"is there, as task {array}_{number}")
        if missing := [job for job in jobs if job.number not in waiting]:
            array, folder = self._submitted(missing)
            for job in missing:
                self.begun(job, folder / f"log-{job.number}.txt", f"submitted as task {array}_{job.number}")
                waiting[job.number] = array, folder
        with signal_numbers() as numbers:
            self._wait(waiting, by_number, numbers)

    def _wait(self, waiting: dict[int, tuple[str, Path]], jobs: dict[int, Job], numbers: socket.socket) -> None:
        """Until each task has ended, telling of each as it does."""
        arrays = {number: array for number, (array, _) in waiting.items()}
        unknown = dict.fromkeys(arrays, 0)
        seen: dict[int, str] = {}
        while arrays:
            self._sleep(numbers)
            states = self._states(set(arrays.values()))
            for number, array in list(arrays.items()):
                if array not in states:
                    continue  # SLURM does not answer
                state = states[array].get(number)
                unknown[number] = 0 if state else unknown[number] + 1
                if state is not None and state.live:
                    if state.name != seen.get(number, "PENDING"):
                        self.say(f"{self.name}/{number} {state.name} {state.nodes}".rstrip())
                    seen[number] = state.name
                elif state is not None or unknown[number] >= _ASKS:
                    del arrays[number]
                    self.over(jobs[number], _end(state, waiting[number][1] / f"log-{number}.txt"))

    def _sleep(self, numbers: socket.socket) -> None:
        """Until it is time to ask again.

        Raises:
            PreemptedError: when this process is told to go; the tasks stay.
        """
        numbers.settimeout(self.poll_s)
        try:
            told = [number for number in numbers.recv(4096) if number not in (signal.SIGCHLD, signal.SIGQUIT)]
        except TimeoutError:
            return
        if told:
            from llm.cluster.jobs import called

            what = (
                f"the jobs go on; the same command waits for them, python -m llm cancel {called(self.folder)} ends them"
            )
            raise preempted(what, signal.Signals(told[0]))

    def _live(self) -> dict[int, tuple[str, Path]]:
        """Jobs of this sweep that are in the queue or at work: the array and its folder, by the job's number."""
        from llm.cluster.jobs import states, submissions, tasks

        found: dict[int, tuple[str, Path]] = {}
        for folder, made in submissions(self.folder):
            if made.kind == "sweep":
                live = [state for state in states(made.job) if state.live]
                found |= {number: (made.job, folder) for state in live for number in tasks(state.task)}
        return found

    def _states(self, arrays: set[str]) -> dict[str, dict[int, State]]:
        """How the tasks of each array are, by number; without those arrays of which SLURM does not say."""
        from llm.cluster.jobs import NoAnswerError, states, tasks

        found = {}
        for array in arrays:
            try:
                told = states(array)
            except NoAnswerError as error:
                self.say(str(error))
                continue
            found[array] = {number: state for state in told for number in tasks(state.task)}
        return found

    def _submitted(self, jobs: Sequence[Job]) -> tuple[str, Path]:
        """The id of the array, and its folder."""
        from llm.submit.submit import array, submit

        configs = []
        for job in jobs:
            cfg = self.loader.load_sweep_config(self.config, list(job.overrides))
            with open_dict(cfg):
                del cfg["hydra"]
            configs.append(cfg)
        commands = {job.number: self.arguments(job) for job in jobs}
        made = array(self.name, self.folder, commands, configs, self.n_jobs)
        return submit(made).job, made.folder


def _end(state: State | None, log: Path) -> End:
    """What SLURM says of a task that has ended, and the task's log, for a job that left no exit.json."""
    if state is None:
        return End(None, "SLURM has forgotten it")
    if state.code is None:
        return End(None, f"{state.name} {state.reason}".rstrip())
    return End(state.code, last_line(log))
