"""Writing text: greedy continuations beside transformers' generate, of the same weights, in float32.

GPT-2's architecture with 10.7 million parameters in its blocks; prompts of 16 to 64 tokens, padded at their left.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import torch

from benchmarks.contestants.command import contestant
from benchmarks.material import model_config, save_steps, save_weights
from benchmarks.measure import Bar, Row, Session

ORDER = 5
BATCHES = (1, 8)
STEPS = 3
AT_LEAST = Bar(">=", 1.0)


def measure(session: Session) -> list[Row]:
    """Tokens per CPU-second, and the ratio, of each number of prompts."""
    if not session.peers.has("transformers"):
        session.skip("transformers is not installed")
        return []
    return [row for n in BATCHES for row in _of(session, n)]


def _of(session: Session, n_prompts: int) -> list[Row]:
    dim, n_layers, n_new = (32, 2, 4) if session.smoke else (384, 6, 64)
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_layers, "max_length": 256, "vocab_size": 4096}
    config = model_config(**shape)
    weights = save_weights(config, session.folder / f"weights-{n_prompts}", theirs=True)
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        lengths = torch.randint(16, 65, (n_prompts,), generator=draw)
        tokens = torch.randint(1, 4096, (n_prompts, int(lengths.max())), generator=draw)
        batches.append([{"tokens": tokens, "padding": lengths.max() - lengths}])
    common = {
        "model": asdict(config),
        "weights": str(weights),
        "steps": str(save_steps(batches, session.folder / f"prompts-{n_prompts}.pt")),
        "n_new": n_new,
    }
    work = [float(n_prompts * n_new)] * session.n_steps(STEPS, warmup=4)
    pythons = {"ours": sys.executable, "theirs": session.peers.python}
    team = [
        contestant(session, kind, "generation", python, {**common, "kind": kind}, work=work)
        for kind, python in pythons.items()
    ]
    outcome = session.compete(f"{n_prompts}", team, steps=STEPS, warmup=4)
    name = f"{n_prompts} prompt{'s' if n_prompts > 1 else ''}"
    return [
        Row(f"{name}: ours", "tokens/CPU-s", outcome.rate("ours"), figures=outcome.figures()),
        Row(f"{name}: ours / transformers' generate", "x", outcome.ratio("ours", "theirs"), AT_LEAST),
    ]
