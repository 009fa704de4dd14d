"""nanoGPT's CPU quick start, and `experiment=shakespeare_char`.

Characters of tiny Shakespeare, 4 layers of 128, windows of 64, 12 a step (karpathy/nanoGPT, README.md and
config/train_shakespeare_char.py). Every run is a child process on one thread, and its cost is its CPU seconds, user and
system, from the start of Python to its end: imports, tokens, validation, samples and checkpoints are in it.

start-up   two steps of the experiment, validated on one batch: what of the others is no training
short      350 steps of it, its schedule ending there: how soon 1.88 is reached
recipe     2,000 steps of it
reference  nanoGPT's own recipe in a plain loop over our network, with its own evaluations

Each model is judged twice on the last tenth of the text: by its own last validation, and by nanoGPT's estimate, over
windows anywhere, which is made here with nothing of the project but the network.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Spread
from benchmarks.measure import Bar, Row, Session
from llm import Transformer, TransformerConfig, load

ROOT = Path(__file__).parents[2]
LENGTH, ROWS, STEPS = 64, 12, 2000
SEEDS = [0, 1]
BRIEF = ["trainer.max_steps=2", "schedule.warmup_steps=0", "trainer.limit_val_batches=1", "~callback.sample"]
BARS = {
    "short": {"cpu_s": Bar("<=", 70), "val_loss": Bar("<=", 1.88)},
    "recipe": {"val_loss": Bar("<=", 1.60)},
}


def text_of(path: Path) -> bytes:
    """The text; of an .gz, unpacked."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def halves(text: bytes) -> tuple[bytes, bytes]:
    """As nanoGPT's data/shakespeare_char/prepare.py splits it."""
    return text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]


def tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets [12, 64] from anywhere, as nanoGPT's get_batch."""
    starts = torch.randint(len(data) - LENGTH, (ROWS, 1), generator=generator)
    at = starts + torch.arange(LENGTH)
    return data[at], data[at + 1]


def loss_of(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), targets.flatten())


@torch.no_grad()
def estimate(model: Transformer, data: Tensor, n_batches: int, seed: int = 1337) -> float:
    """nanoGPT's estimate_loss: the mean over batches of windows from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return sum(loss_of(model, *windows(data, generator)).item() for _ in range(n_batches)) / n_batches


# The reference


def rate(step: int) -> float:
    """nanoGPT's get_lr: 100 steps up to 1e-3, half a cosine down to 1e-4 at step 2,000."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def reference(text: bytes, seed: int, steps: int = STEPS) -> dict[str, float]:
    """AdamW (0.9, 0.99), decay 0.1 of matrices, clipped to 1; learned positions, GELU, layer norms, no biases, tied.

    Every 250 steps, and before the first, both halves are estimated over 20 batches.
    """
    characters = sorted(set(text))
    number = torch.zeros(256, dtype=torch.long)
    number[characters] = torch.arange(len(characters))
    train, val = (number[tensor(half)] for half in halves(text))
    torch.manual_seed(seed)
    model = Transformer(
        TransformerConfig(
            dim=128,
            n_layers=4,
            n_heads=4,
            max_length=LENGTH,
            vocab_size=len(characters),
            position="learned",
            norm="layer",
            activation="gelu",
            bias=False,
            tie_embeddings=True,
            initialisation="gpt2",
        )
    )
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        if step % 250 == 0 or step == steps:
            model.eval()
            estimates = [estimate(model, half, 20, seed=step) for half in (train, val)]
            model.train()
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss_of(model, *windows(train, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return {"val_loss": estimates[1], "windows": estimate(model, val, 200)}


# Children


def child(words: list[str]) -> tuple[float, str]:
    """CPU seconds of a child and all of its own, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def trained(file: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """A run of the experiment, its tokens made anew."""
    words = ["experiment=shakespeare_char", "logger=none", "trainer.accelerator=cpu", *overrides]
    places = [f"data.sources.text.path={file}", f"data.cache_dir={run_dir}-cache", f"run_dir={run_dir}"]
    cpu_s, _ = child(["train.py", *words, *places])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    return {"command": words, "cpu_s": round(cpu_s, 1), "val_losses": losses, "val_loss": list(losses.values())[-1]}


def measured(name: str, text: bytes, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run."""
    file = folder / "input.txt"
    if name == "reference":
        cpu_s, printed = child(["-m", "benchmarks.cpu.quick_start", str(file), str(seed)])
        return {"seed": seed, "cpu_s": round(cpu_s, 1), **json.loads(printed)}
    run_dir = folder / f"{name}-{seed}"
    result = trained(file, run_dir, [f"seed={seed}", *overrides])
    if name == "start-up":
        return {"seed": seed, "command": result["command"], "cpu_s": result["cpu_s"]}
    torch.set_num_threads(1)
    model, _ = load(run_dir)
    return {"seed": seed, **result, "windows": estimate(model, tensor(halves(text)[1]), 200)}


def measure(session: Session) -> list[Row]:
    """All runs, one after the other; of two seeds, in a smoke test of one for a few steps."""
    path = session.data / "lm_tinyshakespeare" / "input.txt.gz"
    if not path.exists():
        session.skip("tiny Shakespeare is not here")
        return []
    text, rows = text_of(path), []
    (session.folder / "input.txt").write_bytes(text)
    runs = {"start-up": BRIEF, "short": ["trainer.max_steps=350"], "recipe": [], "reference": []}
    for name, overrides in {"start-up": BRIEF}.items() if session.smoke else runs.items():
        seeds = SEEDS[:1] if name in ("start-up", "reference") else SEEDS
        told = [measured(name, text, seed, overrides, session.folder) for seed in seeds]
        bars = BARS.get(name, {})
        for figure, unit in (("cpu_s", "CPU-s"), ("val_loss", "nats"), ("windows", "nats")):
            if figure in told[0]:
                value = Spread.of([run[figure] for run in told])
                rows.append(Row(f"{name}: {figure}", unit, value, bars.get(figure), figures={"runs": told}))
    return rows


if __name__ == "__main__":  # the reference, in a process of its own
    torch.set_num_threads(1)
    print(json.dumps(reference(text_of(Path(sys.argv[1])), int(sys.argv[2]))))
