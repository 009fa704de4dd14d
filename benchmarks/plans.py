"""Thirty runs that cannot be, each with the reason that `python -m llm plan` gives and the remedies that it found.

    python benchmarks/plans.py             some minutes; writes benchmarks/results/plans.json
    python benchmarks/plans.py 8B warning  those whose names have one of these words; the others stay as they are

Every remedy has been planned again, and nothing was wrong with it: that is how it was found. Here it is planned once
more from nothing, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import import_path
from llm.plan.remedy import after, examine, remedies
from llm.plan.subject import Stated

RESULTS = Path(__file__).parent / "results" / "plans.json"
ON_H100 = ("cluster=gpu", "cluster.gpu_type=h100", "cluster.gpus_per_node=8", "tokenizer=bytes", "data=files")
LLAMA_8B = (*ON_H100, "model=llama_8b", "optimizer=adamw", "data.max_length=8192", "data.batch_size=64")
LLAMA_1B = (*ON_H100, "model=llama_1b", "optimizer=adamw", "data.max_length=4096", "data.batch_size=64")
ON_32 = (*LLAMA_8B[:-1], "strategy=fsdp", "trainer.precision=bf16-true", "cluster.nodes=4", "data.batch_size=128")
ON_32 = (*ON_32, "data.micro_batch_size=1")
RUNS: dict[str, tuple[str, ...]] = {
    "a misspelt key": ("optimizer.learning_rate=1e-3",),
    "a misspelt choice": ("trainer.precision=bf16_mixed",),
    "a misspelt group": ("strategy=fdsp",),
    "a value out of range": ("model.dropout=1.5",),
    "heads that do not divide the width": ("model.n_heads=5",),
    "key heads that do not divide the heads": ("model.n_kv_heads=3",),
    "odd heads with rotary positions": ("model.head_dim=33",),
    "a window without a family": ("model.global_every=2",),
    "rows longer than the context": ("data.max_length=512", "model.max_length=256"),
    "a vocabulary smaller than the tokenizer's": ("model.vocab_size=100",),
    "a warm-up longer than the run": ("schedule.warmup_steps=500",),
    "an objective of another family": ("objective=masked_lm",),
    "a model of another family": ("model=tiny_encoder",),
    "two processes of one device": ("trainer.devices=2",),
    "a batch that processes cannot share": (*ON_H100, "strategy=ddp", "data.batch_size=12"),
    "micro-batches that do not divide": ("data.batch_size=16", "data.micro_batch_size=6"),
    "two nodes of one device": (*ON_H100, "cluster.nodes=2", "data.batch_size=128"),
    "heads that tensor parallelism cannot share": (*ON_H100, "strategy=fsdp", "strategy.tensor_parallel_size=3"),
    "replicas that do not divide": (*ON_H100, "strategy=fsdp", "strategy.replicate_size=3", "data.batch_size=64"),
    "16 bits that lose the weights' precision": ("trainer.precision=16-mixed",),
    "GPUs asked for on CPUs": ("cluster=cpu", "cluster.tasks_per_node=1", "trainer.accelerator=gpu"),
    "a resumption of nothing": ("resume=must",),
    "float8 on a CPU": ("strategy.float8=true",),
    "a kernel that a CPU has not": ("strategy.attention=cudnn",),
    "8B on one device each": (*LLAMA_8B, "strategy=ddp"),
    "8B with large micro-batches": (*LLAMA_8B, "strategy=fsdp", "trainer.precision=bf16-true"),
    "1B with large micro-batches": (*LLAMA_1B, "strategy=ddp", "data.micro_batch_size=8"),
    "a vocabulary of 128k at once": (*LLAMA_1B, "model.vocab_size=128256", "strategy=fsdp", "data.micro_batch_size=8"),
    "a warning shorter than a save": (*ON_32, "strategy.checkpointing=full", "cluster.warning_s=30"),
    "a time limit that restarts do not cover": (*ON_32, "trainer.max_steps=2000000", "cluster.max_requeues=1"),
}


def main() -> None:
    """Plan each, print and write what was found, one after the other."""
    rows = {row["case"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    chosen = [name for name in RUNS if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("any text\n" * 100)
        for name in chosen:
            run = RUNS[name]
            given = (*run, *([f"data.path={text}"] if "data=files" in run else []), "logger=none")
            start = time.perf_counter()
            found = examine(given, Stated())
            mended = remedies(found, Stated())
            seconds = time.perf_counter() - start
            passed = bool(mended) and _passes(after(given, mended[0]))
            told = {"problems": found.problems, "remedies": mended, "passes": passed}
            rows[name] = {"case": name, "run": list(run), **told, "seconds": round(seconds, 1)}
            RESULTS.write_text(json.dumps([rows[name] for name in RUNS if name in rows], indent=1) + "\n")
            print(f"{'ok ' if passed and found.problems else 'NOT'} {seconds:5.1f} s  {name}: {' '.join(run)}")
            print(*(f"      {problem}" for problem in found.problems), sep="\n")
            print(*(f"        passes with {' '.join(changes)}" for changes in mended), sep="\n", flush=True)
    if not all(rows[name]["problems"] and rows[name]["passes"] for name in chosen):
        sys.exit(1)


def _passes(overrides: tuple[str, ...]) -> bool:
    """Whether a process that knows nothing of this has nothing to say against it; the disk of this machine aside."""
    command = [sys.executable, "-m", "llm", "plan", "--json", *overrides]
    environment = os.environ | {"PYTHONPATH": import_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    problems = json.loads(done.stdout)["problems"]
    return not [problem for problem in problems if not problem.startswith("run_dir:")]


if __name__ == "__main__":
    main()
