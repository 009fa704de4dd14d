"""Two ranks with gloo: strategy=ddp beside torch's DistributedDataParallel in a plain loop.

The same decoder on the same rows, each rank its half; one core and one thread each. CPU time is that of both ranks.
"""

from __future__ import annotations

import os
from dataclasses import replace

from benchmarks.contestants.command import plain
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

ORDER = 6
STEPS = 20
BAR = Bar(">=", 0.98)


def measure(session: Session) -> list[Row]:
    """Ours over theirs."""
    cpus = sorted(os.sched_getaffinity(0))[-2:]
    if len(cpus) < 2:
        session.skip("two ranks want two cores")
        return []
    n_steps = session.n_steps(STEPS)
    length, dim = (32, 32) if session.smoke else (128, 192)
    run = text_run(session, length=length, rows=8, n_steps=n_steps, precision="32-true")
    n_layers, n_heads = (1, 2) if session.smoke else (6, 6)
    config = model_config(dim=dim, n_layers=n_layers, n_heads=n_heads, max_length=length, vocab_size=vocabulary(run))
    loaded = steps_of(run, n_steps)
    steps, work = save_steps(loaded, session.folder / "steps.pt"), n_real(loaded)
    weights = save_weights(config, session.folder / "weights")
    run += ["strategy=ddp", "trainer.devices=2", "data.micro_batch_size=4", *model_overrides(config)]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    mine = ours("ours", run, n_steps, weights, work=work, ranks=2)
    theirs = plain(session, "plain DDP", config, weights, steps, "32-true", more={"world_size": 2}, work=work, ranks=2)
    team = [replace(each, environment=each.environment | alone) for each in (mine, theirs)]
    outcome = session.compete("ddp", team, steps=STEPS, cpus=cpus)
    return [
        Row("2 ranks: ours / plain DDP", "x", outcome.ratio("ours", "plain DDP"), BAR, figures=outcome.figures()),
        Row("2 ranks: ours", "tokens/CPU-s", outcome.rate("ours")),
    ]
