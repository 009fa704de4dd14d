"""A real SLURM on this machine for tests: `slurm-box` beside this file, and a folder that users would have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BOX = Path(__file__).with_name("slurm-box")
POLL_S = 0.2
# A model so small that starting its processes is what a job costs, on a text that makes a few hundred rows.
TINY = [
    *("data=files", "data.path=text.jsonl", "tokenizer=bytes", "data.max_length=64", "data.batch_size=8"),
    *("data.micro_batch_size=2", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.ffn_dim=64"),
    *("callback.sample.prompts=[]", "schedule.warmup_steps=0", "trainer.val_check_interval=30"),
    *("trainer.limit_val_batches=1", "callback.metrics.every_n_steps=1", "callback.checkpoint.every_n_train_steps=10"),
    *("trainer.precision=32-true", "trainer.max_steps=60", "logger=none", "optimizer=adamw"),
]
# Of a run that is to be interrupted: a step takes so long that there is one to interrupt.
PACED = ["packages=[pace]", "+callback.pace={_target_: pace.Pace, seconds: 0.15}"]
_PACE = '''"""A step takes at least so long."""

import time

from lightning.pytorch.callbacks import Callback


class Pace(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *arguments: object) -> None:
        time.sleep(self.seconds)
'''


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "needs root: nodes are namespaces"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter") if not shutil.which(name)]
    return f"no {', '.join(missing)}: run tests/cluster/slurm-box install" if missing else None


class Box:
    """A cluster, and the folder in which its user works."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.site = home / "site"
        mine = ("SLURM_", "LLM_", "OMP_", "CUDA_")  # of the tests, and none of the user's
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(mine)},
            "SLURMBOX_DIR": str(home / "box"),
            "LLM_CACHE_DIR": str(home / "cache"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.site),  # where the user's own package lies
            "WANDB_MODE": "offline",
        }
        self.site.mkdir(parents=True)
        for name in ("conf", "llm", "slurm"):
            shutil.copytree(ROOT / name, self.site / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "train.py", self.site)
        (self.site / "pace.py").write_text(_PACE)
        lines = (json.dumps({"text": f"line {n} of a text, with words of it. " * 6}) for n in range(400))
        (self.site / "text.jsonl").write_text("\n".join(lines) + "\n")

    def up(self, n_nodes: int) -> None:
        self.box("up", str(n_nodes))

    def down(self) -> None:
        self.box("down")

    def box(self, *command: str) -> str:
        """A command of slurm-box."""
        done = self.tried(str(BOX), *command)
        assert done.returncode == 0, f"slurm-box {' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def exec(self, *command: str) -> str:
        """What a command prints on the login node, in the user's folder."""
        return self.box("exec", *command)

    def tried(self, *command: str, timeout_s: float = 110) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.site, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def llm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python -m llm …` on the login node."""
        return self.tried(str(BOX), "exec", "python", "-m", "llm", *arguments)

    def submit(self, *arguments: str) -> str:
        """The id of the job."""
        done = self.llm("submit", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()[1].rstrip(":")

    def sbatch(self, *arguments: str) -> str:
        """The id of the job."""
        return self.exec("sbatch", "--parsable", *arguments).strip()

    def state(self, job: str) -> str:
        """Of all tasks, what SLURM calls them."""
        told = self.exec("scontrol", "show", "job", "--oneliner", job)
        words = {word.partition("=")[2] for word in told.split() if word.startswith("JobState=")}
        return ",".join(sorted(words))

    def restarts(self, job: str) -> int:
        told = self.exec("scontrol", "show", "job", "--oneliner", job)
        return max(int(word.partition("=")[2]) for word in told.split() if word.startswith("Restarts="))

    def wait(self, what: str, true: Callable[[], Any], timeout_s: float = 90, log: Path | None = None) -> None:
        """Return as soon as `true` gives something true."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                shown = log.read_text()[-4000:] if log is not None and log.exists() else ""
                queue = self.exec("squeue", "--noheader")
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{queue}\n{shown}")
            time.sleep(POLL_S)

    def ended(self, job: str, timeout_s: float = 90, log: Path | None = None) -> str:
        """The state in which a job ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.wait(f"end of job {job}", lambda: all(s in over for s in self.state(job).split(",")), timeout_s, log)
        return self.state(job)

    def run_dir(self, name: str) -> Path:
        return self.site / "runs" / name

    def step(self, name: str) -> int:
        """The last step that a run has written down."""
        return max((row["step"] for row in lines(self.run_dir(name) / "metrics.jsonl")), default=0)

    def reaches(self, name: str, step: int, timeout_s: float = 90) -> None:
        """Return when a run has done `step` steps."""
        log = self.run_dir(name) / "jobs" / "train" / "log.txt"
        self.wait(f"{name} at step {step}", lambda: self.step(name) >= step, timeout_s, log)

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return [row for row in lines(self.run_dir(name) / "attempts.jsonl") if row["event"] == "begin"]


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of JSON, without a last one that is being written."""
    text = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(row) for row in text if row.endswith("}\n")]


def ledger(run_dir: Path) -> list[tuple[Any, ...]]:
    """What each step consumed, and its loss to the bit; of a step that was done again, the last time."""
    found: dict[int, tuple[Any, ...]] = {}
    for row in lines(run_dir / "ledger.jsonl"):
        if "event" not in row:
            kept = {name: value for name, value in row.items() if name != "chain"}
            found[row["step"]] = tuple(sorted((name, json.dumps(value)) for name, value in kept.items()))
    return [found[step] for step in sorted(found)]


def weights(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, the optimizer's too; which process wrote which may differ."""
    from safetensors.numpy import load_file

    newest = max((run_dir / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("tensors-*.safetensors"))
    return {name: tensor.tobytes() for file in files for name, tensor in load_file(file).items()}


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in lines(run_dir / "metrics.jsonl") if row.get("train/loss") is not None]


def cpu(nodes: int, tasks_per_node: int) -> Sequence[str]:
    """Overrides of a job without GPUs."""
    return (
        "cluster=cpu",
        f"cluster.nodes={nodes}",
        f"cluster.tasks_per_node={tasks_per_node}",
        "cluster.cpus_per_task=1",
    )
