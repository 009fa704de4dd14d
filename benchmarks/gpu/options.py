"""What single options are worth: attention kernels and scores in parts at 124M, float8 at 1.56B."""

from __future__ import annotations

from benchmarks.device import SIZES, Size, Trained, time_for
from benchmarks.measure import Row, Session

ORDER = 3
NEEDED_S = 70.0  # one contestant, with its compilation
KERNELS, ON_CPU = ("flash", "cudnn"), ("flash", "math")


def measure(session: Session) -> list[Row]:
    """Tokens per second with each."""
    by_name = {size.name: size for size in SIZES}
    n_logits = 16 if session.smoke else 8192
    kernels = ON_CPU if session.smoke else KERNELS
    at_124m = {f"logits_at_once={n_logits}": (f"objective.logits_at_once={n_logits}",)}
    at_124m |= {f"attention={kernel}": (f"strategy.attention={kernel}",) for kernel in kernels}
    rows = _with(session, by_name["124M"], at_124m)
    if session.smoke:
        session.skip("float8: no CPU multiplies in it, and no small model is the faster for it")
        return rows
    return rows + _with(session, by_name["1.56B"], {"float8": ("strategy.float8=true",)})


def _with(session: Session, size: Size, options: dict[str, tuple[str, ...]]) -> list[Row]:
    """One contest: all against the same without the option."""
    if not time_for(session, NEEDED_S * (1 + len(options))):
        session.skip(f"{', '.join(options)}: no time left; python benchmarks/run.py gpu options measures them alone")
        return []
    try:
        trained = Trained(session, size)
    except LookupError as reason:
        session.skip(str(reason))
        return []
    team = [trained.ours(), *(trained.ours(name, *overrides) for name, overrides in options.items())]
    outcome = trained.compete(team)
    trained.close()
    rows = [trained.row(outcome, contestant.name) for contestant in team]
    return rows + [Row(f"{trained.size.name}: {name} / without", "x", outcome.ratio(name, "ours")) for name in options]
