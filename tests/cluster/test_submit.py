"""What `submit` makes of a command line, without a SLURM: scripts, refusals, and what is kept for whom."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm.cluster import Slurm, partition
from llm.cluster.commands import logs, status
from llm.cluster.jobs import NoAnswerError, Submission, newest, states, submissions
from llm.cluster.partition import Nodes
from llm.command import compose
from llm.config import ConfigError
from llm.run import run
from llm.submit import submit as submitting
from llm.submit.batch import BatchJob, script, written
from llm.submit.combinations import combinations
from llm.submit.commands import combination, submit, where
from llm.sweep.commands import report
from tests.cluster.box import TINY, cpu
from tests.test_conf import CONF, EXPERIMENTS, FINE_TUNING, needs


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's, whose sbatch keeps what it is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n' * 50)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "sbatch": 'cp "${@: -1}" submitted; env > environment; echo 42',
        "scontrol": "echo JobId=42 JobState=$(cat state) Reason=Priority 'NodeList=(null)' Restarts=3",
        "sinfo": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    (tmp_path / "state").write_text("RUNNING")
    return tmp_path


@pytest.fixture
def uncosted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is traced to tell what a run costs, as of the later runs of an array: most of the time of a refusal."""
    monkeypatch.setattr(submitting, "_examined", partial(submitting._examined, costs=False))


def directives(script: str) -> dict[str, str]:
    rows = [text.removeprefix("#SBATCH --") for text in script.splitlines() if text.startswith("#SBATCH ")]
    return {row.partition("=")[0]: row.partition("=")[2] for row in rows}


def arguments(script: str) -> list[str]:
    """What the shell makes of the script's own `set --`."""
    (row,) = [text for text in script.splitlines() if text.startswith("set -- ")]
    program = row + '\nprintf "%s\\0" "$@"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for init_from, with a tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "text.jsonl").write_text('{"text": "some words"}\n' * 50)
    places = [f"run_dir={folder / 'run'}", f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder / 'cache'}"]
    run(
        compose(
            [
                "tokenizer=bytes",
                "trainer.max_steps=1",
                "schedule.warmup_steps=0",
                "data.max_length=64",
                "data=files",
                "logger=none",
                "data.val_every=5",
                *places,
            ]
        )
    )
    return folder / "run"


ON_CPUS = ("smoke", "bert_pretrain", "t5_pretrain")  # of all of them the plan would take minutes


@pytest.mark.parametrize(
    ("experiment", "cluster"),
    [*((experiment, "gpu") for experiment in EXPERIMENTS), *((experiment, "cpu") for experiment in ON_CPUS)],
)
def test_every_experiment_on_every_cluster(experiment: str, cluster: str, site: Path, weights: Path) -> None:
    """A dry run of each: the script asks for what the cluster says, and hands the run what the user said."""
    given = [f"experiment={experiment}", f"cluster={cluster}"]
    given += needs(experiment, site / "text.jsonl", weights / "tokenizer")
    if experiment in FINE_TUNING:
        given += [text.replace("BASE", str(weights)) for text in FINE_TUNING[experiment][1]]
        given += [] if experiment == "translate_multi30k" else [f"tokenizer.path={weights / 'tokenizer'}"]
        given += ["data.max_length=64"]
    given += ["cluster.nodes=2", "strategy=ddp", "data.micro_batch_size=null"]
    given += ["cluster.gpus_per_node=2"] if cluster == "gpu" else ["cluster.tasks_per_node=2"]
    job = submitting.planned("train", given)
    script = written(job)
    asked = directives(script)
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("2", "2")
    assert asked.get("gpus-per-node") == ("2" if cluster == "gpu" else None)
    assert (asked["requeue"], asked["open-mode"], asked["signal"]) == ("", "append", "USR1@300")
    assert "cpus-per-gpu" not in asked
    assert arguments(script) == [*given, f"run_name={job.name}"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not (site / "runs").exists(), "a dry run writes nothing"


def documented() -> list[tuple[str, str, str]]:
    """Kind of job, options and overrides of all jobs that README, docs and slurm/ show, if they train or prepare."""
    root = CONF.parent
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("slurm/*")]
    text = "\n".join(path.read_text() for path in sorted(pages))
    found = []
    for words in re.findall(r"^python -m llm submit ([^#\n]*)", text, re.MULTILINE):
        named = re.search(r"--job (\w+)", words)
        overrides = [word for word in words.split() if "=" in word]
        found.append((named[1] if named else "train", "", " ".join(overrides)))
    template = r"(?:sbatch|salloc) ([^\n]*?) slurm/(train|sweep|interactive)\.\w+ +([^#\n]*=[^#\n]*)"
    for options, kind, overrides in re.findall(template, text):
        found.append(("sweep" if kind == "sweep" else "train", options, overrides))
    for overrides in re.findall(r"^python train\.py -m hydra/launcher=slurm ([^#\n]*)", text, re.MULTILINE):
        found.append(("sweep", "", overrides))
    return [(kind, *rest) for kind, *rest in dict.fromkeys(found) if kind in ("train", "sweep", "prepare")]


@pytest.mark.usefixtures("uncosted")
@pytest.mark.parametrize(("kind", "options", "overrides"), documented())
def test_documented_jobs_are_not_refused(kind: Any, options: str, overrides: str, site: Path) -> None:
    asked = dict(option.removeprefix("--").split("=") for option in options.split() if option.startswith("--"))
    cluster = []
    if asked:
        cluster = ["cluster=gpu" if "gpus-per-node" in asked else "cluster=cpu"]
        names = {"nodes": "nodes", "gpus-per-node": "gpus_per_node", "ntasks-per-node": "tasks_per_node"}
        cluster += [f"cluster.{names[name]}={value}" for name, value in asked.items() if name in names]
    assert submitting.planned(kind, [*cluster, *overrides.split()]).kind == kind


@given(st.lists(st.text(st.characters(exclude_characters="\0\r", codec="utf-8")), min_size=1, max_size=4))
def test_arguments_reach_the_job_as_they_were(words: list[str]) -> None:
    template = "#!/usr/bin/env bash\n#SBATCH --cpus-per-gpu=8\n#SBATCH --mail-type=END\nprintf '%s\\0' \"$@\"\n"
    job = BatchJob("train", "name", Path("runs/name"), words, Slurm(tasks_per_node=1))
    made = script(job, template)
    done = subprocess.run(["bash", "-c", made], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words
    assert directives(made)["mail-type"] == "END", "what a site adds to a template stays"


def test_submitted(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder that the job runs from, what is said of it, and that a live run is not submitted twice."""
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # submitted from within another job
    command = [*cpu(2, 2), *TINY, "strategy=ddp", "run_name=mine", "optimizer.lr=1e-2"]
    submit(command)
    told = capsys.readouterr().out
    for text in ("42: 2 x 2 ranks", "runs/mine", "jobs/train/log.txt", "logs mine --follow"):
        assert text in told
    folder = site / "runs/mine/jobs/train"
    ((_, made),) = submissions(site / "runs/mine")
    assert (made.job, made.kind, made.name, made.run_dir) == ("42", "train", "mine", "runs/mine")
    assert (folder / "code/llm/run.py").read_bytes() == (CONF.parent / "llm/run.py").read_bytes()
    assert (folder / "code/slurm/job.sh").exists()
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    assert (frozen["trainer"]["num_nodes"], frozen["trainer"]["devices"]) == (2, 2)
    assert frozen["optimizer"]["lr"] == 1e-2
    assert (site / "submitted").read_text() == (folder / "script.sbatch").read_text()
    environment = (site / "environment").read_text()
    assert "SLURM_JOB_ID" not in environment
    assert "LLM_RUN_ID" not in environment
    kept = [path for path in folder.rglob("*") if path.is_file() and b"a-secret-of-mine" in path.read_bytes()]
    assert not kept
    with pytest.raises(submitting.SubmittedError, match="job 42 of it is RUNNING - python -m llm cancel mine"):
        submit(command)
    (site / "state").write_text("COMPLETED")
    submit(command)
    assert len(submissions(site / "runs/mine")) == 2, "what was submitted before stays"
    status([])
    assert "COMPLETED" in capsys.readouterr().out


def test_the_copy_knows_its_commit(tmp_path: Path) -> None:
    from llm.code import commit, copy_code, difference

    def git(*command: str) -> None:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *command], cwd=tmp_path / "a", check=True, capture_output=True)

    (tmp_path / "a/llm").mkdir(parents=True)
    (tmp_path / "a/llm/x.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert difference(tmp_path / "a") == ""
    git("clone", ".", "../c")
    (tmp_path / "a/llm/new.py").write_text("a line\n\n")
    assert str(commit(tmp_path / "a")).endswith("-dirty"), "a new file is a difference, too"
    (tmp_path / "a/llm/x.py").write_text("2\n\n")
    copy_code(tmp_path / "b", tmp_path / "a")
    assert commit(tmp_path / "b") == commit(tmp_path / "a")
    (tmp_path / "patch").write_text(difference(tmp_path / "a"))
    subprocess.run(["git", "apply", "../patch"], cwd=tmp_path / "c", check=True)
    for name in ("x.py", "new.py"):
        wanted = (tmp_path / "a/llm" / name).read_text()
        assert (tmp_path / "b/llm" / name).read_text() == (tmp_path / "c/llm" / name).read_text() == wanted


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cluster.nodes=0"], "cluster.nodes: 0 - must be a whole number at least 1"),
        (["cluster=gpu", "cluster.gpus_per_node=0"], "cluster.gpus_per_node: 0 - must be"),
        (["cluster=nowhere"], "cluster: nowhere"),
        (["cluster.tasks_per_node=null"], "each GPU is one rank's"),
        (["cluster.time=soon"], "cluster.time: 'soon' - must be DAYS-HH:MM:SS"),
        (["cluster.time=0:01:00", "cluster.warning_s=60"], "cluster.warning_s: 60 - the whole time limit is 60 s"),
        (["cluster.time=43200"], "cluster.time: 43200 - is a number here, as YAML reads 1:30:00 without quotes"),
        (["+cluster.options.partition=gpu"], "cluster.options.partition: 'gpu' - is set already - cluster.partition"),
        (["cluster.partition='a; rm -rf x'"], "cluster.partition: 'a; rm -rf x' - sbatch takes a word"),
        (["+cluster.options.nodes=3"], "cluster.options.nodes: 3 - is set already - cluster.nodes"),
        (["+cluster.options.constraint='a\"b'"], "cluster.options.constraint: 'a\"b' - sbatch takes a word"),
        (["run_name='a b'"], "run_name: 'a b' - names a folder and a job"),
        (["run_name='$(reboot)'"], "run_name: '$(reboot)' - names a folder and a job"),
        (["run_name='../up'"], "run_name: '../up' - names a folder and a job"),
        (["run_name='a/../../up'"], "run_name: 'a/../../up' - names a folder and a job"),
        ([f"run_dir={__file__}"], f"run_dir: {__file__} - is a file - name a directory"),
        (["trainer.num_nodes=2"], "trainer.num_nodes: 2 - follows from cluster.nodes"),
        (["trainer.accelerator=gpu"], "trainer.accelerator: gpu - the job has no GPUs"),
        (["cluster.nodes=2"], "trainer.devices x trainer.num_nodes"),
        (["cluster.tasks_per_node=3", "strategy=ddp"], "data.batch_size"),
        (["model.dmi=3"], "did you mean model.dim?"),
    ],
)
@pytest.mark.usefixtures("uncosted")
def test_refused(overrides: list[str], told: str, site: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        submitting.planned("train", [*cpu(1, 1), *TINY, *overrides])
    assert told in str(refused.value)


@pytest.mark.usefixtures("uncosted")
def test_refused_together(site: Path) -> None:
    """What the check finds and what only the groups together show."""
    with pytest.raises(ConfigError) as refused:
        submitting.planned("train", [*cpu(1, 3), *TINY, "run_name='a b'", "trainer.num_nodes=1"])
    assert len(refused.value.mistakes) == 3


def with_job_script(code: Path) -> Path:
    """A folder of code whose site needs nothing."""
    (code / "slurm").mkdir()
    shutil.copy(CONF.parent / "slurm" / "job.sh", code / "slurm")
    (code / "slurm" / "env.sh").touch()
    return code


def test_a_job_runs_its_frozen_code(tmp_path: Path) -> None:
    """Not that of the folder it was submitted from, which python -m would take."""
    for name in ("live", "frozen"):
        (tmp_path / name / "llm").mkdir(parents=True)
        (tmp_path / name / "llm" / "__init__.py").touch()
        (tmp_path / name / "llm" / "__main__.py").write_text(f"print({name!r})")
    program = 'set -u; source "$LLM_CODE/slurm/job.sh"; inside=() pyxis=(); llm where'
    environment = {**os.environ, "LLM_CODE": str(with_job_script(tmp_path / "frozen")), "PYTHONPATH": ""}
    told = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path / "live", env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == "frozen\n"


def test_a_task_that_comes_back_cancelled_does_not_train(tmp_path: Path) -> None:
    """It was on its way into the queue when `cancel` looked for it."""
    (tmp_path / "cancelled").touch()
    environment = {**os.environ, "LLM_CODE": str(with_job_script(tmp_path)), "LLM_JOB_FOLDER": str(tmp_path)}
    program = 'source "$LLM_CODE/slurm/job.sh"; train; echo $?'
    told = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("75\n", "")


def test_how_an_evaluation_ended_is_not_how_the_training_did(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site / "runs/big/jobs/evaluate"
    folder.mkdir(parents=True)
    (site / "runs/big/exit.json").write_text('{"code": 0, "cause": "finished"}')
    Submission("42", "evaluate", "evaluate-big", "runs/big", "now", None, [], None).write(folder)
    (site / "state").write_text("FAILED")
    status(["big"])
    told = capsys.readouterr().out
    assert "FAILED" in told
    assert "finished" not in told


@pytest.mark.usefixtures("uncosted")
def test_without_sbatch(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch: is not here - submit on a login node"):
        submit([*cpu(1, 1), *TINY, "run_name=mine"])
    assert not (site / "runs").exists()


@pytest.mark.usefixtures("uncosted")
def test_what_sbatch_says_is_shown_whole(site: Path) -> None:
    (site / "tools/sbatch").write_text("#!/bin/bash\nprintf 'sbatch: error: one\\nsbatch: error: two\\n' >&2; exit 1\n")
    with pytest.raises(ConfigError) as refused:
        submit([*cpu(1, 1), *TINY, "run_name=mine"])
    assert refused.value.mistakes == ["sbatch refused:", "sbatch: error: one", "sbatch: error: two"]
    assert not (site / "runs/mine/jobs/train").exists()


PARTITIONS = [
    Nodes("cpu", True, 4, 16, {"": 0}, 60),
    Nodes("gpu", False, 2, 64, {"": 8, "h100": 8}, None),
    Nodes("gpu", False, 1, 32, {"": 4, "a100": 4}, None),
]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Slurm(nodes=4, tasks_per_node=4, cpus_per_task=4, time="1:00:00"), []),
        (Slurm(nodes=5, tasks_per_node=1, time="30"), ["cluster.nodes: 5 - partition cpu has 4"]),
        (Slurm(tasks_per_node=4, cpus_per_task=5, time="30"), ["take 20 cores", "at most cluster.cpus_per_task=4"]),
        (Slurm(tasks_per_node=1, time="1:00:01"), ["cluster.time: 1:00:01 - partition cpu ends jobs after 60 minutes"]),
        (Slurm(gpus_per_node=1, time="30"), ["a node of partition cpu has no GPUs - another cluster.partition"]),
        (Slurm(nodes=3, gpus_per_node=8, partition="gpu"), []),
        (
            Slurm(gpus_per_node=8, gpu_type="a100", partition="gpu"),
            ["has 4 a100 GPUs - at most cluster.gpus_per_node=4"],
        ),
        (Slurm(gpus_per_node=8, partition="gpus"), ["no such partition - did you mean gpu?"]),
    ],
)
def test_beyond_the_partition(asked: Slurm, told: list[str]) -> None:
    found = partition.problems(asked, PARTITIONS)
    assert bool(found) == bool(told)
    assert all(text in "\n".join(found) for text in told)


def test_sinfo_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "cpu*|4|16+|(null)|1:00:00\ngpu|2|64|gpu:h100:8(S:0-1),nvme:1|infinite\ngpu|1|32|gpu:2|2-00:00:00\n"
    rows += "odd|1|8|gpu:nvidia_h100-sxm5-80gb:8(S:0-1),gpu:a100_1g.5gb:4|infinite\n"
    monkeypatch.setattr(partition, "slurm", lambda *command: rows)
    assert partition.nodes() == [
        Nodes("cpu", True, 4, 16, {"": 0}, 60),
        Nodes("gpu", False, 2, 64, {"": 8, "h100": 8}, None),
        Nodes("gpu", False, 1, 32, {"": 2}, 2880),
        Nodes("odd", False, 1, 8, {"": 12, "nvidia_h100-sxm5-80gb": 8, "a100_1g.5gb": 4}, None),
    ]


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("1-0", 1440), ("1-2:30", 1590), ("2-00:00:30", 2880.5)],
)
def test_time_limits(time: str, minutes: float) -> None:
    """As sbatch(1) reads them."""
    assert Slurm(tasks_per_node=1, time=time, warning_s=0).minutes == pytest.approx(minutes)


@pytest.mark.usefixtures("uncosted")
def test_a_sweep_is_hydras(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each array task gets what `python train.py -m` would run as the job of its number."""
    swept = ["optimizer.lr=1e-3,3e-3", "model.dim=range(32,97,32)", "+data.note='a b,c'"]
    found = combinations(swept)
    assert len(found) == 6
    assert found[4] == ["optimizer.lr=0.003", "model.dim=64", "+data.note='a b,c'"]
    combination(["4", *swept])
    assert capsys.readouterr().out.split("\0") == [*found[4], ""]
    with pytest.raises(ConfigError, match="are 6 runs - --array=0-5"):
        combination(["6", *swept])
    with pytest.raises(ConfigError, match="interval"):
        combinations(["optimizer.lr=interval(0,1)"])
    job = submitting.planned("sweep", [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,3e-3"])
    script = written(job)
    assert directives(script)["array"] == "0-1"
    assert f"LLM_SWEEP_ID={shlex.quote(job.name)}" in script
    named = submitting.planned("sweep", [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,3e-3", "run_name=lr"])
    assert (named.name, named.run_dir, "run_name=lr" in named.arguments) == ("lr", Path("runs/lr"), False)
    assert "LLM_SWEEP_ID=lr" in written(named)
    with pytest.raises(ConfigError, match="run_dir: here - is one directory, and each task needs one - python train"):
        submitting.planned("sweep", [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,3e-3", "run_dir=here"])
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 'fast'"):
        submitting.planned("sweep", [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,fast"])
    forced = submitting.planned("sweep", [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,3e-3", "++run_name=lr"])
    assert not [text for text in forced.arguments if "run_name" in text], "each is lr/0, lr/1"
    with pytest.raises(ConfigError, match="cluster: tasks of an array ask for the same - sweep other keys"):
        submitting.planned("sweep", [*cpu(1, 1), *TINY, "cluster.memory=1G,2G"])


@pytest.mark.usefixtures("uncosted")
def test_a_sweep_that_is_at_work_is_not_begun_again(site: Path) -> None:
    """Whoever began it: the launcher of train.py -m calls its arrays sweep-0, sweep-1 …"""
    folder = site / "runs/lr/jobs/sweep-0"
    folder.mkdir(parents=True)
    Submission("41", "sweep", "lr", "runs/lr", "now", None, [], 2).write(folder)
    swept = [*cpu(1, 1), *TINY, "optimizer.lr=1e-3,3e-3", "run_name=lr"]
    with pytest.raises(submitting.SubmittedError, match="job 41 of it is RUNNING - python -m llm cancel lr first"):
        submitting.planned("sweep", swept)
    (site / "state").write_text("COMPLETED")
    assert submitting.planned("sweep", swept).n_tasks == 2


@pytest.mark.usefixtures("uncosted")
def test_a_sweep_over_files_of_ones_own(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "own/optimizer").mkdir(parents=True)
    shutil.copy(CONF / "optimizer/adamw.yaml", site / "own/optimizer/mine.yaml")
    swept = ["--config-dir", "own", *cpu(1, 1), *TINY, "optimizer=mine", "optimizer.lr=1e-3,3e-3", "run_name=lr"]
    job = submitting.planned("sweep", swept)
    capsys.readouterr()
    combination(["1", *job.arguments])
    words = capsys.readouterr().out.split("\0")
    assert words[:2] == ["--config-dir", str((site / "runs/lr/jobs/sweep/config-dir").absolute())]
    assert "optimizer.lr=0.003" in words


def test_a_submitted_sweep_can_be_reported(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And goes on as what it was; one that sbatch refused has never begun."""
    swept = ["--job", "sweep", *cpu(1, 1), *TINY, "run_name=lr"]
    (site / "tools/sbatch").rename(site / "tools/away")
    (site / "tools/sbatch").write_text("#!/bin/bash\nexit 1\n")
    (site / "tools/sbatch").chmod(0o755)
    with pytest.raises(ConfigError, match="sbatch refused"):
        submit([*swept, "optimizer.lr=1,2,3"])
    (site / "tools/away").rename(site / "tools/sbatch")
    submit([*swept, "optimizer.lr=1e-3,3e-3"])
    (site / "runs/lr/1").mkdir()
    (site / "runs/lr/1/exit.json").write_text('{"code": 65, "cause": "DataError: it is not there"}')
    capsys.readouterr()
    report(["lr"])
    told = capsys.readouterr().out
    assert "DataError: it is not there" in told
    assert sorted(set(told.split()) & {"0.001", "0.003"}) == ["0.001", "0.003"]
    (site / "state").write_text("COMPLETED")
    with pytest.raises(ConfigError, match=r"lr/1: optimizer\.lr=0\.002 - was a job with optimizer\.lr=0\.003"):
        submit([*swept, "optimizer.lr=1e-3,2e-3"])
    submit([*swept, "optimizer.lr=1e-3,3e-3"])


def test_a_job_for_everything_else(site: Path) -> None:
    """One process, with a GPU only where there is something to compute."""
    (site / "runs/there").mkdir(parents=True)
    prepare = submitting.planned("prepare", ["cluster=gpu", *TINY], n_shares=4)
    asked = directives(written(prepare))
    assert (asked["array"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("0-3", "1", "64")
    assert "gpus-per-node" not in asked
    evaluate = submitting.planned("evaluate", ["cluster=gpu", "cluster.nodes=4", "runs/there", "--limit", "4"])
    asked = directives(written(evaluate))
    assert (asked["nodes"], asked["gpus-per-node"]) == ("1", "1")
    assert arguments(written(evaluate)) == ["runs/there", "--limit", "4"]
    with pytest.raises(ConfigError, match="evaluate: of which run"):
        submitting.planned("evaluate", ["cluster=gpu"])
    with pytest.raises(ConfigError, match="export: missing - no such directory"):
        submitting.planned("export", ["cluster=cpu", "missing", "out"])
    (site / "runs/there/checkpoints/step-00000002").mkdir(parents=True)
    step = submitting.planned("evaluate", ["cluster=cpu", "runs/there/checkpoints/step-00000002"])
    assert step.folder == Path("runs/there/jobs/evaluate"), "in a checkpoint it would be damage"
    (site / "runs/mean").mkdir()
    (site / "runs/mean/MANIFEST.json").touch()
    assert submitting.planned("export", ["cluster=cpu", "runs/mean", "out"]).folder == Path("runs/mean.out/jobs/export")
    with pytest.raises(ConfigError, match="no job was submitted for it"):
        submitting.planned("export", ["cluster=cpu", "missing", "out"], after=["nobody"])
    (site / "runs/there/jobs/train").mkdir(parents=True)
    for behind in ("", "/checkpoints/step-00000009"):
        named = submitting.planned("export", ["cluster=cpu", f"there{behind}", "out"], after=["7"])
        assert (named.arguments, named.run_dir) == ([f"runs/there{behind}", "out"], Path("runs/there"))


@pytest.mark.usefixtures("uncosted")
def test_a_container_is_handed_on(site: Path) -> None:
    job = submitting.planned("train", [*cpu(1, 1), *TINY, "cluster.container=/images/llm.sif", "run_name=mine"])
    assert "export LLM_CONTAINER=/images/llm.sif" in written(job)


def test_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    where(TINY)
    assert capsys.readouterr().out == "runs/12\n"
    with pytest.raises(ConfigError, match=r"did you mean model\.dim"):
        where(["model.dmi=3"])


def test_looking_at_jobs_loads_nothing_that_trains() -> None:
    program = (
        "import sys; from llm.__main__ import main\n"
        "try: main(['status'])\nfinally: sys.exit(str({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CONF.parent, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_what_was_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Submission("1", "train", "a", "runs/a", "now", None, ["x=1"], None)
    folder = tmp_path / "jobs/train"
    folder.mkdir(parents=True)
    made.write(folder)
    assert submissions(tmp_path) == [(folder, made)]
    monkeypatch.setattr("os.replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        replace(made, job="2").write(folder)
    assert submissions(tmp_path) == [(folder, made)], "the old record, whole"


def test_jobs_that_the_controller_has_forgotten(site: Path) -> None:
    """Accounting is asked, where there is any; else nobody knows."""
    (site / "tools/scontrol").write_text(
        "#!/bin/bash\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n"
    )
    assert states("42") == []
    sacct = site / "tools/sacct"
    sacct.write_text("#!/bin/bash\necho 'COMPLETED|n[1-2]|42_0'; echo 'CANCELLED by 0|n1|42_1'\n")
    sacct.chmod(0o755)
    assert [(one.name, one.nodes, one.task, one.live) for one in states("42")] == [
        ("COMPLETED", "n[1-2]", "0", False),
        ("CANCELLED", "n1", "1", False),
    ]
    sacct.write_text("#!/bin/bash\necho Slurm accounting storage is disabled >&2; exit 1\n")
    assert states("42") == []
    (site / "tools/scontrol").write_text("#!/bin/bash\necho Unable to contact slurm controller >&2; exit 1\n")
    with pytest.raises(NoAnswerError, match="Unable to contact"):
        states("42")


def test_what_sbatch_would_misread(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces and percent signs of folders; options that a site has added to a template; a warning that is off."""
    odd = site / "a folder 100% #1"
    odd.mkdir()
    monkeypatch.chdir(odd)
    template = "#!/bin/bash\n#SBATCH --signal=USR1@300\n#SBATCH -A theirs\n#SBATCH --comment=x # why\ntrue\n"
    options = {"constraint": "(a100|h100)&nvlink"}
    job = BatchJob("train", "n", Path("runs/n"), [], Slurm(tasks_per_node=1, time="5:00", warning_s=0, options=options))
    rows = script(job, template).splitlines()
    assert f'#SBATCH --chdir="{odd}"' in rows
    assert f'#SBATCH --output="{str(odd).replace("%", "%%")}/runs/n/jobs/train/log.txt"' in rows
    read = rows[: next(n for n, row in enumerate(rows) if not row.startswith("#"))]  # sbatch stops there
    assert "#SBATCH -A theirs" in read
    assert "#SBATCH --comment=x # why" in read
    assert '#SBATCH --constraint="(a100|h100)&nvlink"' in read
    assert not [row for row in rows if "--signal" in row]


@pytest.mark.usefixtures("uncosted")
def test_files_of_ones_own_are_frozen(site: Path) -> None:
    """--config-dir names a folder that is edited while the job waits."""
    (site / "own/cluster").mkdir(parents=True)
    text = (CONF / "cluster/cpu.yaml").read_text().replace("cpus_per_task: 4", "cpus_per_task: 3")
    (site / "own/cluster/mine.yaml").write_text(text)
    submit(["--config-dir", "own", *TINY, "cluster=mine", "run_name=mine"])
    folder = site / "runs/mine/jobs/train"
    assert (folder / "config-dir/cluster/mine.yaml").read_text() == text
    script = (site / "submitted").read_text()
    assert arguments(script)[:2] == ["--config-dir", str(folder / "config-dir")]
    assert directives(script)["cpus-per-task"] == "3"
    (site / "state").write_text("COMPLETED")
    (site / "own/notes.bin").touch()
    submit(["--config-dir", ".", *TINY, *cpu(1, 1), "run_name=below"])
    copied = site / "runs/below/jobs/train/config-dir"
    assert (copied / "own/cluster/mine.yaml").exists(), "though the run lies in the folder that is copied"
    assert not (copied / "own/notes.bin").exists()
    assert not (copied / "runs/below").exists()


def test_the_log_of_a_task_of_an_earlier_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search submits one array after the other."""
    monkeypatch.chdir(tmp_path)
    for number in (0, 2):
        folder = tmp_path / f"runs/a/jobs/sweep-{number}"
        folder.mkdir(parents=True)
        Submission(str(number), "sweep", "a", "runs/a", f"2026-01-0{number + 1}", None, [], 2).write(folder)
        (folder / f"log-{number}.txt").write_text(f"of task {number}\n")
    logs(["a", "--task", "0"])
    assert capsys.readouterr().out == "of task 0\n"


def test_the_newest_job_that_trains(tmp_path: Path) -> None:
    """Is whose log is shown, and who is waited for, unless another kind is asked for."""
    for number, kind in enumerate(("train", "evaluate")):
        folder = tmp_path / "jobs" / kind
        folder.mkdir(parents=True)
        Submission(str(number), kind, "a", "runs/a", f"2026-01-0{number + 1}", None, [], None).write(folder)
    assert newest(tmp_path)[1].job == "0"
    assert newest(tmp_path, "evaluate")[1].job == "1"
    with pytest.raises(ConfigError, match="has no such job - there is train, evaluate"):
        newest(tmp_path, "export")
