"""Every point at which a process can die while it saves, keeps and removes checkpoints, on 1 and 2 processes, with and
without a thread: `python benchmarks/reliability/crash_points.py`. Wanted: none after which no checkpoint verifies.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from record import record

from tests.checkpoint import test_crash_points as scenarios
from tests.checkpoint.crash_points import survivors, survivors_of_ranks


def main() -> None:
    """One row for each scenario."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for background in (False, True):
            how = "in the background" if background else "waiting"
            save = partial(scenarios.with_retention, background=background)
            (folder / how).mkdir()
            rows[f"1 process, {how}"] = survivors(folder / how, scenarios.two, save)
            (folder / f"{how} damaged").mkdir()
            replace = partial(scenarios.with_set_aside, background=background)
            rows[f"a damaged one replaced, {how}"] = survivors(folder / f"{how} damaged", scenarios.damaged, replace)
            for rank in (0, 1):
                place = folder / f"{how} {rank}"
                place.mkdir()
                rows[f"2 processes, {how}, rank {rank} dies"] = survivors_of_ranks(place, scenarios.two, save, rank)
    found = {name: {str(step): n for step, n in Counter(steps).items()} for name, steps in rows.items()}
    n_lost = sum(steps.count(None) for steps in rows.values())
    record(
        "crash points",
        {"points": sum(map(len, rows.values())), "without a verified checkpoint": n_lost, "newest verified": found},
    )


if __name__ == "__main__":
    main()
