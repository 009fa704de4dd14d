"""The jobs of a sweep as tasks of an array, on a SLURM that is made up (a real one: tests/cluster)."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from llm.cluster.jobs import NoAnswerError, State, tasks
from llm.config import ConfigError
from llm.submit.commands import combination
from llm.submit.record import Job, Record
from llm.sweep import Slurm
from llm.sweep.launcher import last_line
from llm.sweep.slurm import _end


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", []), ("3", [3]), ("0-3", [0, 1, 2, 3]), ("0,4-6%2", [0, 4, 5, 6]), ("0-6:3", [0, 3, 6]), ("N/A", [])],
)
def test_tasks_that_wait_together(text: str, numbers: list[int]) -> None:
    """As squeue(1) and scontrol(1) write them."""
    assert tasks(text) == numbers


class Queue:
    """SLURM's answers, one after the other; the last stays."""

    def __init__(self, *answers: list[State] | NoAnswerError) -> None:
        self.answers = list(answers)

    def __call__(self, job: str) -> list[State]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, NoAnswerError):
            raise answer
        return answer


def launcher(folder: Path) -> Slurm:
    """One whose sweep is in `folder`, of three jobs."""
    made = Slurm("val/loss", poll_s=0.001)
    made.folder, made.name, made.record, made.swept = folder, folder.name, Record(folder), ["seed"]
    made.record.enter([Job(n, [f"seed={n}"]) for n in range(3)])
    return made


def finish(folder: Path, number: int) -> None:
    (folder / str(number)).mkdir(parents=True)
    end = {"code": 0, "cause": "finished", "step": 1, "max_steps": 1}
    (folder / str(number) / "exit.json").write_text(json.dumps(end))
    (folder / str(number) / "summary.json").write_text(json.dumps({"val/loss": number + 0.5}))


def test_waits_until_each_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a controller that does not answer, a task that is queued again, and one that is forgotten."""
    folder = tmp_path / "a"
    slurm = launcher(folder)
    log = folder / "jobs/sweep-0/log-1.txt"
    log.parent.mkdir(parents=True)
    log.write_text("data.path: missing\n== exit code 65\n")
    finish(folder, 0)
    queue = Queue(
        [State("PENDING", task="0-2%8")],
        [State("RUNNING", nodes="n1", task="0"), State("RUNNING", nodes="n2", task="1"), State("PENDING", task="2")],
        NoAnswerError("scontrol does not answer - ask again later"),
        [
            State("REQUEUED", task="0"),
            State("FAILED", "NonZeroExitCode", task="1", code=65),
            State("RUNNING", task="2"),
        ],
        [State("RUNNING", nodes="n3", task="0"), State("RUNNING", task="2")],
        [State("COMPLETED", task="0"), State("RUNNING", task="2")],
        [State("COMPLETED", task="0")],
    )
    monkeypatch.setattr("llm.cluster.jobs.states", queue)
    monkeypatch.setattr(Slurm, "_live", lambda self: {})
    monkeypatch.setattr(Slurm, "_submitted", lambda self, jobs: ("42", folder / "jobs/sweep-0"))
    slurm.start([Job(n, [f"seed={n}"]) for n in range(3)])
    told = [text.partition(" ")[2] for text in capsys.readouterr().out.splitlines()]
    assert told == [
        *(f"a/{n} submitted as task 42_{n}: seed={n} (log: {folder}/jobs/sweep-0/log-{n}.txt)" for n in range(3)),
        "a/0 RUNNING n1",
        "a/1 RUNNING n2",
        "scontrol does not answer - ask again later",
        "a/0 REQUEUED",
        "a/1 failed: 65: data.path: missing",
        "a/2 RUNNING",
        "a/0 RUNNING n3",
        "a/0 finished: val/loss 0.5",
        "a/2 failed: SLURM has forgotten it",
    ]


def test_those_that_are_there_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the others submitted."""
    from llm.cluster.jobs import Submission

    folder = tmp_path / "a"
    slurm = launcher(folder)
    before = folder / "jobs/sweep-0"
    before.mkdir(parents=True)
    Submission("7", "sweep", "a", str(folder), "2026", None, [], 3).write(before)
    answers = {"7": Queue([State("RUNNING", task="1"), State("FAILED", task="0")], []), "8": Queue([])}
    monkeypatch.setattr("llm.cluster.jobs.states", lambda job: answers[job](job))
    submitted: list[int] = []

    def submit(self: Slurm, jobs: list[Job]) -> tuple[str, Path]:
        submitted.extend(job.number for job in jobs)
        return "8", folder / "jobs/sweep-0-1"

    monkeypatch.setattr(Slurm, "_submitted", submit)
    slurm.start([Job(n, [f"seed={n}"]) for n in range(3)])
    assert submitted == [0, 2]
    assert f"a/1 is there, as task 7_1: seed=1 (log: {before}/log-1.txt)" in capsys.readouterr().out


def test_told_to_go_it_leaves_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.signals import PreemptedError

    slurm = launcher(tmp_path / "a")

    def states(job: str) -> list[State]:
        signal.raise_signal(signal.SIGINT)
        return [State("RUNNING", task="0")]

    monkeypatch.setattr("llm.cluster.jobs.states", states)
    monkeypatch.setattr(Slurm, "_live", lambda self: {0: ("42", tmp_path)})
    with pytest.raises(PreemptedError, match="SIGINT: the jobs go on; the same command waits for them") as left:
        slurm.start([Job(0, ["seed=0"])])
    assert left.value.exit_code == 130


def test_what_is_known_of_a_task_that_said_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _end(State("NODE_FAIL", "NodeDown"), log).cause == "NODE_FAIL NodeDown"
    assert (_end(State("FAILED", code=1), log).code, _end(State("FAILED", code=1), log).cause) == (1, "")
    log.write_text("the reason\n== exit code 70\nslurmstepd: error\n\n")
    assert last_line(log) == "the reason"


SCRIPTS = {
    "sbatch": 'cp "${@: -1}" submitted; echo 42',
    "scontrol": "echo JobId=43 ArrayJobId=42 ArrayTaskId=0-1 JobState=COMPLETED Reason=None ExitCode=0:0",
    "sinfo": "exit 1",
}
REAL = ("hydra/launcher=slurm", "hydra.launcher.poll_s=0.01", "run_name=a", "tokenizer=bytes", "data=files")
REAL += ("data.path=text.jsonl", "data.max_length=64", "cluster=cpu", "cluster.tasks_per_node=2", "strategy=ddp")


def test_an_array_whose_tasks_are_told_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By train.py as it is: everything is checked, frozen and handed to sbatch; each task finds its own overrides."""
    import sys

    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n' * 50)
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nseed: 5\n")
    (tmp_path / "tools").mkdir()
    for name, body in SCRIPTS.items():
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:/usr/bin:/bin")
    root = Path(__file__).parents[2]
    told = ("--config-dir", "own", "-m", "experiment=mine", *REAL, "optimizer.lr=1e-3,2e-3")
    done = subprocess.run([sys.executable, str(root / "train.py"), *told], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # since nothing has run
    script = Path("submitted").read_text()
    assert "#SBATCH --array=0,1%8\n" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script
    folder = tmp_path / "runs/a/jobs/sweep-0"
    assert (folder / "code/llm/run.py").exists()
    for number, lr in enumerate(("0.001", "0.002")):
        combination([str(number), "--file", str(folder / "runs.json")])
        words = capsys.readouterr().out.split("\0")[:-1]
        assert words[:2] == ["--config-dir", str(folder / "config-dir")]
        assert words[2] == f"hydra.job.num={number}"
        assert words[-2:] == [f"optimizer.lr={lr}", f"run_name=a/{number}"]
    with pytest.raises(ConfigError, match=r"2: .*runs.json has 0, 1"):
        combination(["2", "--file", str(folder / "runs.json")])


def test_what_is_wrong_with_one_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything, and before anything is written."""
    from llm.command import compose
    from llm.submit.submit import array

    Path("text.jsonl").write_text('{"text": "some words"}\n' * 50)
    monkeypatch.setenv("PATH", "/nowhere")
    settings = [text for text in REAL if not text.startswith("hydra")]
    configs = [compose([*settings, *more]) for more in ([], ["data.batch_size=3", "data.micro_batch_size=null"])]
    with pytest.raises(ConfigError, match=r"data\.batch_size=3: must be a multiple of 2 processes"):
        array("a", Path("runs/a"), {0: [], 1: ["data.batch_size=3"]}, configs, 8)
    configs[1].cluster.cpus_per_task = 2
    with pytest.raises(ConfigError) as refused:
        array("a b", Path("runs/a"), {0: [], 1: ["trainer.num_nodes=2"]}, configs, 8)
    assert refused.value.mistakes == [
        "run_name: 'a b' - names a folder and a job - letters, digits and . _ - + only, and / between them",
        "cluster: tasks of an array ask for the same - sweep other keys",
        "trainer.num_nodes: 2 - follows from cluster.nodes - leave it out, and set cluster.nodes",
    ]
    assert not Path("runs").exists()
