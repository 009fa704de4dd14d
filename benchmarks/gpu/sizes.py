"""Decoders in bfloat16: ours beside a compiled plain loop over our model, and beside litgpt over its own.

MFU is (6N + 12·L·H·Q·T) times tokens per second over the dense bf16 peak: causal attention is not halved, recomputation
does not count. `bar` is what one H200 must reach and what one would like it to. litgpt has no learned positions and no
tied head: there ours has neither.
"""

from __future__ import annotations

from benchmarks.contest import Outcome
from benchmarks.device import LIKE_LITGPT, SIZES, Size, Trained, time_for
from benchmarks.measure import Bar, Row, Session

ORDER = 2
OVER_PLAIN, OVER_LITGPT = Bar(">=", 0.98), Bar(">=", 1.0)
PLAIN, LITGPT = "plain compiled loop", "litgpt"


def measure(session: Session) -> list[Row]:
    """Tokens per second of each, and their ratios; the sizes that have to be reached first."""
    first, later = SIZES[:3], SIZES[3:]
    plan = [(size, PLAIN) for size in first] + [(size, LITGPT) for size in first] + [(size, PLAIN) for size in later]
    rows: list[Row] = []
    for size, other in plan:
        if session.case in f"{size.name} {other}":
            rows += _beside(session, size, other)
    return rows


def _beside(session: Session, size: Size, other: str) -> list[Row]:
    """One contest."""
    name = f"{size.name}, {other}"
    if other == LITGPT and not session.peers.has("litgpt"):
        session.skip(f"{name}: it is not installed")
        return []
    if not time_for(session, (1.7 if other == LITGPT and not size.together else 1) * size.needed_s):
        session.skip(f"{name}: no time left; python benchmarks/run.py gpu sizes --case '{size.name}' measures it alone")
        return []
    try:
        trained = Trained(session, size, *(LIKE_LITGPT if other == LITGPT else ()))
    except LookupError as reason:
        session.skip(str(reason))
        return []
    rival = trained.litgpt() if other == LITGPT else trained.plain()
    outcome = trained.compete([rival, trained.ours()])
    trained.close()
    rows = _rows(trained, outcome, other)
    for row in rows:  # whatever becomes of the sizes that come after
        session.say(f"    {row.case}: {row.value.median:,.4g} {row.unit} {row.note}")
    return rows


def _rows(trained: Trained, outcome: Outcome, other: str) -> list[Row]:
    size, ratio = trained.size.name, outcome.ratio("ours", other)
    if other == LITGPT:
        mine = trained.row(outcome, "ours", shown="ours, rotary")
        return [trained.row(outcome, other), mine, Row(f"{size}: ours / litgpt", "x", ratio, OVER_LITGPT)]
    mine = trained.row(outcome, "ours", judged=True)
    return [trained.row(outcome, other), mine, Row(f"{size}: ours / {other}", "x", ratio, OVER_PLAIN)]
