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
from benchmarks.machine import ROOT
from benchmarks.material import SHARED, composed, save_steps, save_weights
from benchmarks.measure import Bar, Row, Session
from llm.build import built
from llm.metric import model_flops_utilisation, peak_flops
from llm.model import Transformer, TransformerConfig

STEPS, WARMUP = 60, 10
TOLERANCE = 5e-2  # of losses near 11, which bfloat16 rounds by up to 0.03
# Bytes of a parameter in training: fp32 weight and gradient, two moments; what autocast keeps of it in bfloat16.
BYTES_PER_PARAMETER = 18
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A model to be trained, and what one GPU is to make of it.

    rows  of a step, where there are 120 GiB; on a smaller device half of them
    must, stretch  tokens per second on one H200 (989 TFLOP/s dense bf16)
    """

    name: str
    model: tuple[str, ...]
    length: int
    rows: int
    compile: str
    must: float
    stretch: float | None


GPT2 = "model=gpt2_124m"
SIZES = (
    Size("124M", (GPT2,), 1024, 64, "whole", 470e3, 560e3),
    Size("350M", ("model=gpt2_355m",), 1024, 32, "whole", 190e3, 220e3),
    Size("1.56B", ("model=gpt2_1558m",), 1024, 16, "blocks", 47e3, 53e3),
    Size("1.3B", (GPT2, "model.dim=2048", "model.n_layers=24", "model.n_heads=16"), 2048, 8, "blocks", 50e3, 58e3),
    Size("8B", ("model=llama_8b",), 8192, 1, "blocks", 7.5e3, 8.8e3),
)
SMALL = ("model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=null", "model.ffn_dim=64")


@functools.cache
def _ceilings(device: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.contestants.ceilings", device, str(size)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def ceilings(session: Session) -> dict[str, Any]:
    """Copy and product, the device's name and its memory; measured once."""
    return _ceilings(session.device, 64 if session.smoke else 8192)


class Trained:
    """The contestants over one size, and their common weights and steps.

    Raises LookupError, with the reason, if the size does not fit the device.
    """

    def __init__(self, session: Session, size: Size) -> None:
        self.session, self.size = session, size
        small = session.smoke
        length = 32 if small else size.length
        self.run = [*size.model, *(SMALL if small else ()), "model.dropout=0.0", f"data.max_length={length}"]
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
        self.rows = 2 if small else max(1, size.rows if memory > 120 * GIB else size.rows // 2)
        self.length = length
        self.n_tokens = float(self.rows * length)
        self.n_steps = session.n_steps(STEPS, WARMUP, starts=session.rounds)
        folder = session.folder / size.name
        self.weights = save_weights(self.config, folder / "weights", state=False)
        self.steps = save_steps(list(self._made()), folder / "steps.pt")
        text = folder / "text.txt"
        text.write_text("any text: the steps are prepared\n" * 1000)
        self.run += [
            "tokenizer=bytes",
            "data=files",
            f"data.path={text}",
            "data.document_mask=false",
            f"data.batch_size={self.rows}",
            "data.micro_batch_size=null",
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
            ids = torch.randint(0, self.config.vocab_size, (self.rows, self.length + 1), generator=draw)
            yield [
                {
                    "tokens": ids[:, :-1].contiguous(),
                    "labels": ids[:, 1:].contiguous(),
                    "documents": torch.ones(self.rows, self.length, dtype=torch.long),
                    "positions": torch.arange(self.length).repeat(self.rows, 1),
                    "tasks": torch.zeros(self.rows, dtype=torch.long),
                }
            ]

    def ours(self, name: str = "ours", *overrides: str) -> Contestant:
        """train.py, compiled, with further overrides."""
        run = [*self.run, f"strategy.compile={compile_choice()}", *overrides]
        return ours(name, run, self.n_steps, self.weights, steps=self.steps, **self._shared())

    def plain(self) -> Contestant:
        """A compiled plain loop over our model class."""
        settings = {
            "kind": "ours",
            "model": asdict(self.config),
            "weights": str(self.weights / "step-0"),
            "steps": str(self.steps),
            "precision": "bf16-mixed",
            "fields": [],
            "device": self.session.device,
            "compile": self.size.compile,
        }
        return contestant(self.session, "plain compiled loop", "plain", sys.executable, settings, **self._shared())

    def _shared(self) -> dict[str, Any]:
        # A rehearsal goes the same way, and nothing is really compiled.
        environment = {"TORCH_COMPILE_DISABLE": "1"} if self.session.smoke else {}
        return {"work": [self.n_tokens] * self.n_steps, "environment": environment}

    def compete(self, team: Sequence[Contestant]) -> Outcome:
        """One after the other: two large models do not fit beside each other."""
        name = f"{self.size.name}-{team[0].name}".replace(" ", "-")
        return self.session.compete(
            name,
            team,
            steps=STEPS,
            warmup=WARMUP,
            starts=self.session.rounds,
            tolerance=TOLERANCE,
            clock="wall_s",
            apart=True,
        )

    def row(self, outcome: Outcome, name: str, *, judged: bool = False) -> Row:
        """Tokens per second, with utilisation and memory in the note."""
        speed = outcome.rate(name)
        peak = peak_flops(ceilings(self.session)["device"])
        notes = [f"{self.rows} x {self.length}"]
        if peak is not None:
            flops = self.network.flops_per_token(self.length)
            notes.append(f"MFU {100 * model_flops_utilisation(speed.median, flops, peak):.1f} %")
        memory = max(told.get("peak_bytes", 0.0) for told in outcome.rounds[name])
        if memory:
            notes.append(f"peak {memory / GIB:.1f} GiB")
        notes.append(f"loss {outcome.losses[name][-1]:.4f}")
        bar = Bar(">=", self.size.must) if judged else None
        stretch = Bar(">=", self.size.stretch) if judged and self.size.stretch else None
        return Row(f"{self.size.name}: {name}", "tokens/s", speed, bar, stretch, ", ".join(notes), outcome.figures())

    def close(self) -> None:
        """Give the disk back: weights of a large model are gigabytes."""
        for file in sorted(Path(self.weights).rglob("*")):
            if file.is_file():
                file.unlink()


def compile_choice() -> str:
    """What strategy.compile is told: where it is a choice of ways, the strategy's own."""
    return "true" if isinstance(composed([]).strategy.compile, bool) else "auto"


def strategy_has(key: str) -> bool:
    """Whether strategy=single has the key."""
    return key in composed([]).strategy


def time_for(session: Session, seconds: float) -> bool:
    """Whether so much is left until the command has to be done."""
    return session.deadline is None or time.monotonic() + seconds < session.deadline
