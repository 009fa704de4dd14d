"""On a real SLURM: templates and `submit`, signals, requeueing, lost nodes, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.box import BOX, PACED, ROOT, TINY, Box, cpu, ledger, lines, losses, weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
DDP, FSDP = "strategy=ddp", "strategy=fsdp"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "slurm/train.sbatch")


@pytest.fixture(scope="module")
def reference(box: Box) -> Path:
    """2 nodes x 2 ranks, submitted, and left alone."""
    job = box.submit(*cpu(2, 2), *TINY, DDP, "run_name=reference")
    assert box.ended(job, log=box.run_dir("reference") / "jobs/train/log.txt") == "COMPLETED"
    return box.run_dir("reference")


@pytest.fixture(scope="module")
def pair(box: Box) -> Path:
    """2 nodes with a rank each, left alone."""
    job = box.submit(*cpu(2, 1), *TINY, DDP, "run_name=pair")
    assert box.ended(job, log=box.run_dir("pair") / "jobs/train/log.txt") == "COMPLETED"
    return box.run_dir("pair")


def near(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) == 60 and all(abs(a - b) <= 1e-5 * b for a, b in zip(found, wanted, strict=True))


def test_the_same_losses_as_one_process(box: Box, reference: Path) -> None:
    """Submitted; by the template as it is, under fsdp; and in one process without SLURM."""
    staged = "--export=ALL,LLM_SCRATCH=/dev/shm/scratch"  # which each node has for itself
    job = box.sbatch(staged, *TWO_BY_TWO, *TINY, FSDP, "run_name=template")
    box.exec("python", "train.py", *TINY, "run_name=alone", "trainer.accelerator=cpu")
    assert box.ended(job, log=box.site / f"slurm-{job}.log") == "COMPLETED"
    alone = losses(box.run_dir("alone"))
    assert near(losses(reference), alone)
    assert near(losses(box.run_dir("template")), alone)
    assert "cache_dir: /dev/shm/scratch" in (box.run_dir("template") / "config.yaml").read_text()
    begun = lines(box.run_dir("template") / "attempts.jsonl")[0]
    assert (begun["job"], begun["world_size"], begun["host"]) == (job, 4, "n1")
    frozen, ran = (reference / name for name in ("jobs/train/config.yaml", "config.yaml"))
    differ = {a.split(":")[0].strip() for a in set(frozen.read_text().splitlines()) ^ set(ran.read_text().splitlines())}
    assert differ <= {"accelerator", "vocab_size", "offline", "precision"}, "the job ran what was submitted"


def test_a_run_survives_all_that_a_cluster_does(box: Box, pair: Path) -> None:
    """A signal to the ranks, a preemption, power loss, a restart of the controller, a cable pulled
    for a moment: the same run to the bit, with one W&B run and no step missing or twice.
    (benchmarks/reliability/cluster.py has more, and longer.)"""
    wandb = ["logger=default", "~logger.tensorboard"]
    job = box.submit(*cpu(2, 1), *TINY, *PACED, *wandb, DDP, "run_name=survivor")
    log = box.run_dir("survivor") / "jobs/train/log.txt"

    def urgent() -> None:
        other = box.sbatch("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
        box.ended(other)

    def power_loss() -> None:
        box.box("kill-node", "n2")
        box.wait("the loss of n2", lambda: box.restarts(job) > before, log=log)

    faults: dict[str, Callable[[], object]] = {
        "to the ranks": lambda: box.exec("scancel", "--signal=USR1", job),
        "preemption": urgent,
        "power loss": power_loss,
    }
    for what, fault in faults.items():
        before, step = box.restarts(job), box.step("survivor")
        box.reaches("survivor", step + 3)
        fault()
        box.wait(what, lambda before=before: box.restarts(job) == before + 1, log=log)  # type: ignore[misc]
    box.reaches("survivor", box.step("survivor") + 3)
    for command in (("restart-ctl",), ("cut", "n3"), ("heal", "n3"), ("start-node", "n2")):
        box.box(*command)
    assert box.ended(job, log=log) == "COMPLETED"

    run_dir = box.run_dir("survivor")
    assert ledger(run_dir) == ledger(pair)
    assert weights(run_dir) == weights(pair)
    assert losses(run_dir) == losses(pair)
    steps = [row["step"] for row in lines(run_dir / "metrics.jsonl") if row.get("train/loss") is not None]
    assert steps == list(range(1, 61))
    assert "no sample" in box.exec("python", "-m", "llm", "audit", "runs/survivor")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["restarts"] == len(faults)
    assert [row["restart"] for row in summary["interruptions"]] == list(range(len(faults)))
    assert [row["code"] for row in summary["interruptions"]][:1] == [75]
    assert summary["interruptions"][-1]["code"] in (None, 76), "a node was lost"
    ids = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert log.read_text().count("== job ") == len(faults) + 1, "one log, appended to"


def test_cancelled_and_gone_on_with_on_fewer_nodes(box: Box, pair: Path) -> None:
    """A cancelled job saves, and is not queued again; submitted anew on one node the run goes on."""
    job = box.submit(*cpu(2, 1), *TINY, *PACED, DDP, "run_name=fewer")
    box.reaches("fewer", 5)
    again = box.llm("submit", *cpu(1, 1), *TINY, DDP, "run_name=fewer")
    assert again.returncode == 73
    assert f"job {job} of it is RUNNING" in again.stderr
    assert "RUNNING" in box.llm("status", "fewer").stdout
    assert f"job {job}: told to save" in box.llm("cancel", "fewer").stdout
    assert box.ended(job) == "FAILED"
    assert box.restarts(job) == 0
    assert json.loads((box.run_dir("fewer") / "exit.json").read_text())["code"] == 75
    assert "no job of it" in box.llm("cancel", "fewer").stdout
    second = box.submit(*cpu(1, 1), *TINY, DDP, "run_name=fewer")
    followed = box.llm("logs", "fewer", "--follow").stdout
    assert "continuing from" in followed
    assert "== exit code 0" in followed
    assert box.ended(second) == "COMPLETED"
    assert near(losses(box.run_dir("fewer")), losses(pair))
    assert [row["world_size"] for row in box.attempts("fewer")] == [2, 1]
    shown = box.llm("status").stdout
    assert "60/60" in shown
    assert "0: finished" in shown
    assert "75: " in shown, "the job before is still told of"


def test_a_sweep_with_a_failing_task(box: Box) -> None:
    """Two array tasks, one of which cannot find its data."""
    submitted = box.submit(
        "--job", "sweep", *cpu(1, 1), *TINY, "trainer.max_steps=2", "data.path=text.jsonl,missing.jsonl"
    )
    assert box.ended(submitted) == "COMPLETED,FAILED"
    (folder,) = {path.parents[2] for path in box.site.glob("runs/*/jobs/sweep/submission.json")}
    assert json.loads((folder / "0" / "exit.json").read_text())["code"] == 0
    assert not (folder / "1" / "checkpoints").exists()
    assert "missing.jsonl" in box.llm("logs", folder.name, "--task", "1").stdout
    shown = box.llm("status", folder.name).stdout
    assert "COMPLETED" in shown
    assert "FAILED" in shown


def test_tasks_of_an_array_are_queued_again(box: Box) -> None:
    """By the template, each for itself, the last of them too, whose id is that of the array."""
    swept = [*TINY, *PACED, "trainer.max_steps=30", "optimizer.lr=1e-3,2e-3"]
    job = box.sbatch("--array=0-1", "--ntasks-per-node=1", "slurm/sweep.sbatch", *swept)
    for task in ("0", "1"):
        box.wait(f"task {task}", lambda task=task: box.step(f"{job}/{task}") >= 3)  # type: ignore[misc]
    box.exec("scancel", "--signal=USR1", job)
    assert box.ended(job, log=box.site / f"slurm-{job}_0.log") == "COMPLETED"
    for task in ("0", "1"):
        begun = [row["restart"] for row in box.attempts(f"{job}/{task}")]
        assert begun == [0, 1], (box.site / f"slurm-{job}_{task}.log").read_text()


def test_prepared_as_an_array(box: Box) -> None:
    """Four tasks make the bytes that one process makes."""
    settings = [*TINY, "tokenizer=bpe", "tokenizer.vocab_size=400"]
    alone = box.site / "alone"
    box.exec("python", "-m", "llm", "prepare", *settings, f"data.cache_dir={alone}")
    job = box.sbatch("--array=0-3", "--cpus-per-task=1", "slurm/prepare.sbatch", *settings, "data.cache_dir=array")
    name = box.submit("--job", "prepare", "--shares", "2", *cpu(1, 1), *settings, "data.cache_dir=submitted")
    assert box.ended(job) == box.ended(name) == "COMPLETED"
    wanted = {path.relative_to(alone): path.read_bytes() for path in alone.glob("*/*.bin")}
    assert len(wanted) > 3
    for folder in (box.site / "array", box.site / "submitted"):
        assert {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*.bin")} == wanted


def test_evaluated_and_exported_after_the_run(box: Box) -> None:
    """Jobs that wait for the run's."""
    qwen = ["model.norm=rms", "model.activation=swiglu"]  # of which transformers has the like
    job = box.submit(*cpu(1, 1), *TINY, *qwen, "trainer.max_steps=4", "run_name=followed")
    scored = ["runs/followed", "task=perplexity", "--limit", "4"]
    evaluating = box.submit("--job", "evaluate", "--after", "followed", *cpu(1, 1), *scored)
    run = "runs/followed"
    exporting = box.sbatch(f"--dependency=afterok:{job}", "slurm/export.sbatch", run, "exported")
    again = box.submit("--job", "export", "--after", "followed", *cpu(1, 1), run, "exported too")
    scoring = box.sbatch(f"--dependency=afterok:{job}", "slurm/evaluate.sbatch", *scored)
    assert box.ended(again) == box.ended(scoring) == "COMPLETED"
    assert (box.site / "exported too" / "model.safetensors").exists()
    assert box.ended(evaluating) == "COMPLETED", box.llm("logs", "followed", "--job", "evaluate").stdout
    assert box.ended(exporting) == "COMPLETED", (box.site / f"slurm-{exporting}.log").read_text()
    assert (box.site / "exported" / "model.safetensors").exists()
    assert (box.run_dir("followed") / "predictions.jsonl").exists()


def test_at_once_in_an_allocation(box: Box) -> None:
    """salloc, in what passes for a container: a program of that name, which writes down how it is called."""
    apptainer = box.home / "tools" / "apptainer"
    apptainer.parent.mkdir()
    note = 'echo "$@" >> called; until [[ $1 = *.sif ]]; do shift; done; shift; exec "$@"'
    apptainer.write_text(f"#!/bin/bash\n{note}\n")
    apptainer.chmod(0o755)
    asked = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "slurm/interactive.sh"]
    contained = ["env", f"PATH={apptainer.parent}:{box.environment['PATH']}", "LLM_CONTAINER=/images/llm.sif", *asked]
    done = box.tried(str(BOX), "exec", *contained, *TINY, DDP, "trainer.max_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    called = (box.site / "called").read_text().splitlines()
    assert len(called) == 3, "once to look at the configuration, and once a rank"
    assert all(text.startswith(f"exec --nv --bind {box.site}:{box.site},") for text in called)


def test_what_is_wrong_with_a_start_is_said(box: Box) -> None:
    """Without srun, with the wrong number of tasks, and on hosts whose name leads to themselves only."""
    outside = box.sbatch("--nodes=2", "--output=outside.log", "--wrap", f"python train.py {quoted(TINY)}")
    wrong = f"srun --ntasks=3 python train.py {DDP} trainer.num_nodes=2 trainer.devices=2 {quoted(TINY)}"
    tasks = box.sbatch("--nodes=2", "--ntasks=3", "--output=tasks.log", "--wrap", wrong)
    assert box.ended(outside) == box.ended(tasks) == "FAILED"
    assert "not by srun" in (box.site / "outside.log").read_text()
    assert "--nodes=2 --ntasks-per-node=2" in (box.site / "tasks.log").read_text()
    for node in ("n1", "n2"):
        bad = box.home / f"hosts.{node}"
        hosts = (box.home / "box" / "hosts").read_text()
        bad.write_text("".join(text for text in hosts.splitlines(True) if not text.endswith(f" {node}\n")))
        bad.write_text(bad.read_text() + f"127.0.1.1 {node}\n")
        box.box("on", node, "mount", "--bind", str(bad), "/etc/hosts")
    job = box.sbatch("--nodes=2", "--ntasks-per-node=1", "slurm/train.sbatch", *TINY, DDP, "trainer.max_steps=2")
    state = box.ended(job)
    for node in ("n1", "n2"):
        box.box("on", node, "umount", "/etc/hosts")
    log = (box.site / f"slurm-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert "gloo takes eth0" in log


def test_what_no_other_try_mends_is_not_tried_again(box: Box) -> None:
    """Data that is not there: the rank that only waits leaves with the other's code, and srun gives the highest."""
    job = box.sbatch("--ntasks-per-node=2", "slurm/train.sbatch", *TINY, DDP, "data.path=nowhere.jsonl")
    assert box.ended(job) == "FAILED"
    log = (box.site / f"slurm-{job}.log").read_text()
    assert "== exit code 65" in log, log
    assert "queued again" not in log


def test_refused_before_sbatch(box: Box) -> None:
    """What the partition has not; and what only sbatch knows, in its own words."""
    beyond = box.llm("submit", "--dry-run", "cluster=gpu", "cluster.nodes=9", "cluster.time=3-00:00:00", *TINY, DDP)
    assert beyond.returncode == 64
    for text in ("cluster.nodes: 9 - partition debug has 3", "cluster.gpus_per_node=2", "cluster.time=2880"):
        assert text in beyond.stderr
    reserved = box.llm("submit", *cpu(1, 1), *TINY, "+cluster.options.reservation=nobodys", "run_name=refused")
    assert reserved.returncode == 64
    assert "sbatch refused:" in reserved.stderr
    assert "reservation is invalid" in reserved.stderr
    assert not (box.run_dir("refused") / "jobs" / "train").exists()


def test_no_more_restarts_than_allowed(box: Box) -> None:
    """Told by way of the batch shell, which passes it on."""
    job = box.submit(*cpu(1, 1), *TINY, *PACED, "cluster.max_requeues=0", "run_name=bounded")
    box.reaches("bounded", 3)
    box.exec("scancel", "--signal=TERM", "--batch", job)
    assert box.ended(job) == "FAILED"
    log = box.llm("logs", "bounded").stdout
    assert "0 restarts are enough" in log
    assert "== exit code 75" in log


def test_gpus_become_ranks(box: Box) -> None:
    """The nodes' GPUs are /dev/null, so what can be looked at is how ranks are started."""
    script = box.site / "show.sbatch"
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    shown = "ranks sh -c 'echo \"rank $SLURM_PROCID on $(hostname) gpus=$CUDA_VISIBLE_DEVICES\"'"
    script.write_text(text.replace('train "$@"', f"per_node=$(ranks_per_node)\n{shown}"))
    job = box.sbatch("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=4", str(script))
    assert box.ended(job) == "COMPLETED"
    log = (box.site / f"slurm-{job}.log").read_text()
    wanted = [f"rank {rank} on n{1 + rank // 2} gpus=0,1" for rank in range(4)]
    assert sorted(text for text in log.splitlines() if text.startswith("rank ")) == wanted
    few = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2", "--ntasks-per-node=1", "slurm/train.sbatch")
    job = box.sbatch(*few, *TINY)
    assert box.ended(job) == "FAILED"
    assert "each of the node's 2 GPUs is one rank's" in (box.site / f"slurm-{job}.log").read_text()


def test_scripts_are_clean() -> None:
    scripts = sorted(map(str, [*(ROOT / "slurm").glob("*.s*"), ROOT / "tests/cluster/slurm-box"]))
    done = subprocess.run(
        ["shellcheck", "-x", "--severity=warning", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def quoted(overrides: list[str]) -> str:
    return " ".join(f"'{text}'" for text in overrides)
