"""What our trainer's loop adds to a plain one, over a toy model with five metrics.

Every contestant trains the same small model on the same batches, which lie in memory; the model's own work cancels out.
A step includes taking the batch, forward, backward, clipping, AdamW, and five metrics (loss, tokens, norm of the
gradient, learning rate, tokens per second) that are added up in every step and written to a file every ten. Ours is
train.py with all default callbacks, the ledger and the watchdog among them; `with W&B and TensorBoard` has the default
loggers too, `no callbacks` is its loop alone, so that the difference is what they take; and `reads its data` takes its
batches from token files, through order, packing and collating, which the others do not.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from benchmarks.contestants.command import contestant, plain
from benchmarks.contestants.ours import ours
from benchmarks.material import (
    model_config,
    model_overrides,
    save_steps,
    save_weights,
    steps_of,
    text_run,
    vocabulary,
)
from benchmarks.measure import Bar, Row, Session

ORDER = 1
STEPS = 500
# Of the machine on which stock Lightning took 1,740; of another one, the same part of what stock takes there.
BAR, SHARE = Bar("<=", 150.0), Bar("<=", 100 * 150 / 1740)


def measure(session: Session) -> list[Row]:
    """Microseconds of CPU time a step beyond the plain loop."""
    n_steps = session.n_steps(STEPS)
    run = text_run(session, length=16, rows=2, n_steps=n_steps, precision="32-true")
    config = model_config(dim=16, n_layers=1, n_heads=2, max_length=16, vocab_size=vocabulary(run))
    run += model_overrides(config)
    weights = save_weights(config, session.folder / "weights")
    steps = save_steps(steps_of(run, n_steps), session.folder / "steps.pt")
    stock = {
        "model": asdict(config),
        "weights": str(weights / "state.pt"),
        "steps": str(steps),
        "fields": (),
        "n_steps": n_steps,
    }
    team = [
        plain(session, "plain loop", config, weights, steps, "32-true"),
        ours("ours", run, n_steps, weights, steps=steps),
        contestant(session, "stock Lightning", "stock", sys.executable, stock),
    ]
    if not session.smoke:  # what these do, other measures do, too
        team.append(ours("ours, with W&B and TensorBoard", run, n_steps, weights, steps=steps, loggers=True))
        team.append(ours("ours, no callbacks", run, n_steps, weights, steps=steps, every=False))
        team.append(ours("ours, reads its data", run, n_steps, weights))
    outcome = session.compete("loop", team, steps=STEPS)
    base = outcome.rounds["plain loop"]
    note = f"beyond {1e6 * min(told['cpu_s'] / told['steps'] for told in base):.0f} us of the plain loop"
    rows = [
        Row(name, "us/step", outcome.more_us_per_step(name, "plain loop"), BAR if name == "ours" else None)
        for name in outcome.rounds
        if name != "plain loop"
    ]
    rows[0] = Row(rows[0].case, rows[0].unit, rows[0].value, BAR, note=note, figures=outcome.figures())
    share = outcome.share_of_more("ours", "stock Lightning", "plain loop")
    return [*rows, Row("ours, of what stock Lightning adds", "%", share, SHARE)]
