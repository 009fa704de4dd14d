"""Decoders of three sizes in float32 and bfloat16, beside a plain loop, transformers' Trainer and litgpt.

GPT-2's architecture on rows of 128 bytes, each one document; every contestant without dropout. litgpt has no learned
positions and no tied head: it is measured beside ours with rotary positions and an untied head.
"""

from __future__ import annotations

import torch

from benchmarks.contest import Outcome
from benchmarks.contestants.command import contestant, plain, theirs
from benchmarks.contestants.ours import ours
from benchmarks.material import (
    model_config,
    model_overrides,
    n_real,
    save_steps,
    save_weights,
    steps_of,
    text_run,
    vocabulary,
)
from benchmarks.measure import Bar, Row, Session
from llm.machine import multiplies_bfloat16

ORDER = 2
# name: width, layers, heads, steps of a round
SIZES = {"0.8M": (128, 4, 4, 24), "2.6M": (192, 6, 6, 12), "10.7M": (384, 6, 6, 6)}
TINY = {"tiny": (32, 2, 2, 2)}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
# How far apart the losses of the first twenty steps may be. In bfloat16 a number has 8 bits: losses of 5 are rounded by
# up to 0.02, and the order of operations differs.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
OVER_PLAIN, OVER_TRAINER = Bar(">=", 0.98), Bar(">=", 1.2)


def measure(session: Session) -> list[Row]:
    """Tokens per CPU-second, and how they compare."""
    fast = [name for name in PRECISIONS if name == "fp32" or multiplies_bfloat16(torch.device("cpu"))]
    if len(fast) < len(PRECISIONS) and not session.smoke:
        session.skip("bf16: this CPU has no instructions for it, and nothing trains in it here")
    cases = [(size, precision) for size in SIZES for precision in fast]
    rows = []
    for size, precision in [("tiny", "fp32")] if session.smoke else cases:
        if session.case in f"{size} {precision}":
            rows += _case(session, size, precision)
    return rows


def _case(session: Session, size: str, precision: str) -> list[Row]:
    dim, n_layers, n_heads, pace = (TINY | SIZES)[size]
    length, name = 32 if session.smoke else 128, f"{size} {precision}"
    n_steps, kind = session.n_steps(pace), PRECISIONS[precision]
    run = text_run(session, length=length, rows=4 if size == "10.7M" else 8, n_steps=n_steps, precision=kind)
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "max_length": length, "vocab_size": vocabulary(run)}
    loaded = steps_of(run, n_steps)
    steps, work = save_steps(loaded, session.folder / f"steps-{size}.pt"), n_real(loaded)
    folder = session.folder / f"weights-{size}-{precision}"
    config = model_config(**shape)
    weights = save_weights(config, folder, theirs=session.peers.has("transformers"))
    mine = [*run, *model_overrides(config)]
    team = [
        ours("ours", mine, n_steps, weights, work=work),
        plain(session, "plain loop", config, weights, steps, kind, work=work),
    ]
    if session.peers.has("transformers"):
        named = "plain loop, transformers' GPT-2"
        team.append(theirs(session, named, "plain", "transformers", weights, steps, kind, work=work))
    if session.peers.has("transformers", "accelerate"):
        team.append(theirs(session, "transformers Trainer", "trainer", "decoder", weights, steps, kind, work=work))
    else:
        session.skip(f"{name}: transformers Trainer: transformers or accelerate is not installed")
    options = {"steps": pace, "tolerance": TOLERANCE[precision]}
    outcome = session.compete(f"{name}", team, **options)
    rows = _rows(name, outcome)
    if not session.peers.has("litgpt"):
        session.skip(f"{name}: litgpt is not installed")
        return rows
    rotary = model_config(**shape, position="rotary", tie_embeddings=False)
    weights = save_weights(rotary, folder / "rotary")
    settings = {
        "model": {**shape, "norm_eps": rotary.norm_eps},
        "weights": str(weights / "state.pt"),
        "steps": str(steps),
        "precision": kind,
    }
    beside = session.compete(
        f"{name} litgpt",
        [
            ours("ours, rotary", [*run, *model_overrides(rotary)], n_steps, weights, work=work),
            contestant(session, "litgpt", "fabric", session.peers.python, settings, work=work),
        ],
        **options,
    )
    ratio = beside.ratio("ours, rotary", "litgpt")
    return [*rows, Row(f"{name}: ours / litgpt", "x", ratio, figures=beside.figures())]


def _rows(name: str, outcome: Outcome) -> list[Row]:
    found = [
        Row(f"{name}: ours", "tokens/CPU-s", outcome.rate("ours"), figures=outcome.figures()),
        Row(f"{name}: ours / plain loop", "x", outcome.ratio("ours", "plain loop"), OVER_PLAIN),
    ]
    if "transformers Trainer" in outcome.rounds:
        ratio = outcome.ratio("ours", "transformers Trainer")
        found.append(Row(f"{name}: ours / transformers Trainer", "x", ratio, OVER_TRAINER))
        ratio = outcome.ratio("transformers Trainer", "plain loop, transformers' GPT-2")
        found.append(Row(f"{name}: Trainer / plain loop over its GPT-2", "x", ratio))
    return found
