"""Training runs on a GPU: models, contestants and what is told of them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Contestant, Outcome
from benchmarks.contestants.command import contestant
from benchmarks.contestants.ours import ours
from benchmarks.machine import import_path
from benchmarks.material import SHARED, composed, save_steps, save_weights
from benchmarks.measure import Bar, Row, Session
from llm.build import built
from llm.hardware import gpu_named
from llm.metric import model_flops_utilisation
from llm.model import Transformer, TransformerConfig

MICRO_BATCHES = 60  # measured, of every contestant: of a round 20
WARMUP = 10  # of them before that, at least
TOLERANCE = 5e-2  # of losses near 11, which bfloat16 rounds by up to 0.03
# Bytes of a parameter in training: fp32 weight and gradient, two moments; what autocast keeps of it in bfloat16.
BYTES_PER_PARAMETER = 18
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A model to be trained, and what one GPU is to make of it.

    rows      of a micro-batch, where there are 120 GiB; on a smaller device half of them
    n_micro   micro-batches of a step; on a smaller device twice as many
    must, stretch  tokens per second on one H200 (989 TFLOP/s dense bf16)
    together  two contestants fit the device beside each other: they warm up at the same time and take turns
    needed_s  what measuring two contestants takes
    """

    name: str
    model: tuple[str, ...]
    length: int
    rows: int
    n_micro: int
    compile: str
    must: float
    stretch: float | None
    together: bool
    needed_s: float


GPT2 = "model=gpt2_124m"
LARGE = ("model.dim=2048", "model.n_layers=24", "model.n_heads=16")
# It has neither learned positions nor a tied head.
LIKE_LITGPT = ("model.position=rotary", "model.tie_embeddings=false")
SIZES = (
    Size("124M", (GPT2,), 1024, 64, 1, "whole", 470e3, 560e3, True, 75),
    Size("350M", ("model=gpt2_355m",), 1024, 32, 2, "whole", 190e3, 220e3, True, 100),
    Size("1.56B", ("model=gpt2_1558m",), 1024, 16, 4, "blocks", 47e3, 53e3, False, 150),
    Size("1.3B", (GPT2, *LARGE), 2048, 8, 4, "blocks", 50e3, 58e3, False, 160),
    Size("8B", ("model=llama_8b",), 8192, 1, 1, "blocks", 7.5e3, 8.8e3, False, 300),
)
SMALL = ("model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=null", "model.ffn_dim=64")


@functools.cache
def _ceilings(device: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.contestants.ceilings", device, str(size)]
    environment = os.environ | {"PYTHONPATH": import_path()}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def ceilings(session: Session) -> dict[str, Any]:
    """Copy and product, the device's name and its memory; measured once."""
    return _ceilings(session.device, 64 if session.smoke else 8192)


class Trained:
    """The contestants over one size, and their common weights and steps.

    Args:
        session: what is measured for.
        size: of the model.
        changes: overrides of it.

    Raises LookupError, with the reason, if the size does not fit the device.
    """

    def __init__(self, session: Session, size: Size, *changes: str) -> None:
        self.session, self.size = session, size
        small = session.smoke
        length = 32 if small else size.length
        self.run = [*size.model, *(SMALL if small else ()), *changes, "model.dropout=0.0", f"data.max_length={length}"]
        self.run += [f"model.vocab_size={300 if small else composed(size.model).model.vocab_size}"]
        self.run += ["model.max_length=${data.max_length}"]
        self.config: TransformerConfig = built(composed(self.run).model)
        with torch.device("meta"):
            self.network = Transformer(self.config)
        memory = ceilings(session)["memory_bytes"]
        needed = BYTES_PER_PARAMETER * self.network.n_parameters()
        if memory and needed > 0.9 * memory:
            raise LookupError(
                f"{size.name}: weights, gradients and moments take {needed / GIB:.0f} GiB, and the device has "
                f"{memory / GIB:.0f}"
            )
        halved = 2 if size.rows > 1 and memory < 120 * GIB else 1
        self.rows, self.n_micro = (2, size.n_micro) if small else (size.rows // halved, size.n_micro * halved)
        self.length = length
        self.n_tokens = float(self.rows * self.n_micro * length)
        self.pace = MICRO_BATCHES // (session.rounds * self.n_micro), max(3, WARMUP // self.n_micro)
        self.n_steps = session.n_steps(*self.pace, starts=1)
        folder = session.folder / f"{size.name}{'-changed' if changes else ''}"
        self.weights = save_weights(self.config, folder / "weights", state=bool(changes), device=session.device)
        self.steps = save_steps(list(self._made()), folder / "steps.pt")
        text = folder / "text.txt"
        text.write_text("any text: the steps are prepared\n" * 1000)
        self.run += [
            "tokenizer=bytes",
            "data=files",
            f"data.path={text}",
            "data.document_mask=false",
            f"data.batch_size={self.rows * self.n_micro}",
            f"data.micro_batch_size={self.rows}",
            f"trainer.max_steps={self.n_steps}",
            "trainer.precision=bf16-mixed",
            f"trainer.accelerator={session.device}",
            *SHARED,
        ]

    def _made(self) -> Any:
        """Random tokens: speed does not depend on which they are."""
        draw = torch.Generator().manual_seed(0)
        assert self.config.vocab_size is not None
        for _ in range(self.n_steps):
            rows = [
                torch.randint(0, self.config.vocab_size, (self.rows, self.length + 1), generator=draw)
                for _ in range(self.n_micro)
            ]
            yield [
                {
                    "tokens": ids[:, :-1].contiguous(),
                    "labels": ids[:, 1:].contiguous(),
                    "tasks": torch.zeros(self.rows, dtype=torch.long),
                }
                for ids in rows
            ]

    def ours(self, name: str = "ours", *overrides: str) -> Contestant:
        """train.py, compiled, with further overrides."""
        run = [*self.run, "strategy.compile=auto", *overrides]
        return ours(name, run, self.n_steps, self.weights, steps=self.steps, **self._shared())

    def plain(self) -> Contestant:
        """A compiled plain loop over our model class."""
        settings = {"kind": "ours", "fields": [], "compile": self.size.compile, **self._settings()}
        return contestant(self.session, "plain compiled loop", "plain", sys.executable, settings, **self._shared())

    def litgpt(self) -> Contestant:
        """litgpt, compiled as it does that: as a whole."""
        settings = {"compile": True, **self._settings()}
        return contestant(self.session, "litgpt", "fabric", self.session.peers.python, settings, **self._shared())

    def _settings(self) -> dict[str, Any]:
        return {
            "model": asdict(self.config),
            "weights": str(state if (state := self.weights / "state.pt").exists() else self.weights / "step-0"),
            "steps": str(self.steps),
            "precision": "bf16-mixed",
            "device": self.session.device,
        }

    def _shared(self) -> dict[str, Any]:
        # A rehearsal goes the same way, and nothing is really compiled.
        environment = {"TORCH_COMPILE_DISABLE": "1"} if self.session.smoke else {}
        return {"work": [self.n_tokens] * self.n_steps, "environment": environment}

    def compete(self, team: Sequence[Contestant]) -> Outcome:
        """Turn by turn where two fit the device, having warmed up at the same time, as compiling takes long; else one
        after the other."""
        steps, warmup = self.pace
        together = self.size.together and len(team) == 2
        return self.session.compete(
            f"{self.size.name}-{team[0].name}".replace(" ", "-").replace(",", ""),
            team,
            steps=steps,
            warmup=warmup,
            starts=1,
            tolerance=TOLERANCE,
            clock="wall_s",
            apart=not together,
            hurried=together,
        )

    def row(self, outcome: Outcome, name: str, *, judged: bool = False, shown: str | None = None) -> Row:
        """Tokens per second, with utilisation and memory in the note; `shown` is the name it goes by."""
        speed = outcome.rate(name)
        gpu = gpu_named(ceilings(self.session)["device"])
        notes = [f"{self.n_micro} x {self.rows} x {self.length}"]
        if gpu is not None:
            flops = self.network.flops_per_token(self.length)
            notes.append(f"MFU {100 * model_flops_utilisation(speed.median, flops, gpu.peak_flops):.1f} %")
        memory = max(told.get("peak_bytes", 0.0) for told in outcome.rounds[name])
        if memory:
            notes.append(f"peak {memory / GIB:.1f} GiB")
        notes.append(f"loss {outcome.losses[name][-1]:.4f}")
        bar = Bar(">=", self.size.must) if judged else None
        stretch = Bar(">=", self.size.stretch) if judged and self.size.stretch else None
        case, figures = f"{self.size.name}: {shown or name}", outcome.figures()
        return Row(case, "tokens/s", speed, bar, stretch, ", ".join(notes), figures)

    def close(self) -> None:
        """Give the disk back: weights of a large model are gigabytes."""
        for file in sorted(Path(self.weights).rglob("*")):
            if file.is_file():
                file.unlink()


def time_for(session: Session, seconds: float) -> bool:
    """Whether so much is left until the command has to be done."""
    return session.deadline is None or time.monotonic() + seconds < session.deadline
