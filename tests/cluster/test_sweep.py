"""On a real SLURM: a sweep by `python train.py -m hydra/launcher=slurm`, and all that becomes of it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.box import BOX, PACED, TINY, Box, cpu, lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
COMMAND = [
    *("python", "train.py", "-m", "hydra/launcher=slurm", "hydra.launcher.poll_s=1", *cpu(2, 1), *TINY, *PACED),
    *("run_name=four", "strategy=ddp", "trainer.max_steps=15", "optimizer.lr=1e-3,2e-3,1e30,3e-3"),
    "cluster.cpus_per_task=4",  # half of a node's: the last job has not begun when it is held
]


def begin(box: Box, told: Path) -> subprocess.Popen[bytes]:
    """The command on the login node, in the background; `pid` has its process there."""
    with told.open("wb") as output:
        script = f"echo $$ > pid; exec {shlex.join(COMMAND)}"
        command = [str(BOX), "exec", "bash", "-c", script]
        return subprocess.Popen(command, cwd=box.site, env=box.environment, stdout=output, stderr=output)


def test_a_sweep_fills_its_table(box: Box, tmp_path: Path) -> None:
    """4 jobs x 2 ranks, on two nodes each: one diverges, one is queued again, the controller restarts, and the command
    that waits for them is killed and started again."""
    told, again = tmp_path / "told", tmp_path / "again"
    first, folder = begin(box, told), box.run_dir("four") / "jobs/sweep-0"
    box.wait("the array", (folder / "submission.json").exists, 150, told)
    job = json.loads((folder / "submission.json").read_text())["job"]
    box.exec("scontrol", "hold", f"{job}_3")
    box.exec("kill", "-KILL", (box.site / "pid").read_text().strip())
    assert first.wait(30) != 0
    box.wait("job 1 at step 3", lambda: box.step("four/1") >= 3, 150, folder / "log-1.txt")
    box.exec("scancel", "--signal=USR1", f"{job}_1")
    box.box("restart-ctl")
    second = begin(box, again)
    box.wait("who waits for the held one", lambda: f"four/3 is there, as task {job}_3" in again.read_text(), 150, again)
    box.exec("scontrol", "release", f"{job}_3")
    code, text = second.wait(200), again.read_text()

    assert code == 1, text
    submitted = {path.name for path in (box.run_dir("four") / "jobs").iterdir()}
    assert submitted <= {"sweep-0", "sweep-2"}, "nothing is submitted twice but what had failed by then"
    assert [len(box.attempts(f"four/{number}")) for number in (0, 1, 3)] == [1, 2, 1]
    table = text[text.index("job  optimizer.lr") :].splitlines()
    rows = [row.split() for row in table[1:5]]
    assert [row[1] for row in rows] == ["0.001", "0.002", "1e+30", "0.003"]
    assert [row[3] for row in rows if row[0] != "2"] == ["finished"] * 3
    assert rows[2][2:4] == ["failed", "79:"], table
    assert table[5].startswith("4 jobs: 3 finished, 1 failed; best: job 3, val/loss ")
    assert [row["restart"] for row in box.attempts("four/1")] == [0, 1]
    assert {row["world_size"] for row in box.attempts("four/0")} == {2}
    for row in (rows[0], rows[1], rows[3]):
        measured = lines(box.run_dir(f"four/{row[0]}") / "metrics.jsonl")
        assert float(row[2]) == pytest.approx([one["val/loss"] for one in measured if "val/loss" in one][-1], rel=1e-5)

    shown = box.llm("report", "four", "--out", "four.html")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[:6] == table[:6]
    assert (box.site / "four.csv").read_text().splitlines()[3].startswith("2,1e+30,,failed,79,")
    assert "COMPLETED" in box.llm("status", "four").stdout
