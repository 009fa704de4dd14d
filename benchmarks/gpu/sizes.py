"""Five sizes of decoders in bfloat16, 60 steps after the warm-up: ours beside a compiled plain loop over our model.

MFU is (6N + 12·L·H·Q·T) times tokens per second over the dense bf16 peak: causal attention is not halved, recomputation
does not count. `bar` is what one H200 must reach and what one would like it to.
"""

from __future__ import annotations

import time

from benchmarks.device import SIZES, Trained, time_for
from benchmarks.measure import Bar, Row, Session

ORDER = 2
OVER_PLAIN = Bar(">=", 0.98)


def measure(session: Session) -> list[Row]:
    """Tokens per second of both, and their ratio."""
    rows: list[Row] = []
    took = 0.0
    for size in SIZES:
        if session.case not in size.name:
            continue
        if not time_for(session, 1.5 * took):
            session.skip(f"{size.name}: no time left; python benchmarks/run.py gpu sizes goes on longer alone")
            continue
        start = time.monotonic()
        try:
            trained = Trained(session, size)
        except LookupError as reason:
            session.skip(str(reason))
            continue
        outcome = trained.compete([trained.plain(), trained.ours()])
        rows.append(trained.row(outcome, "plain compiled loop"))
        rows.append(trained.row(outcome, "ours", judged=True))
        ratio = outcome.ratio("ours", "plain compiled loop")
        rows.append(Row(f"{size.name}: ours / plain compiled loop", "x", ratio, OVER_PLAIN))
        trained.close()
        took = time.monotonic() - start
    return rows
