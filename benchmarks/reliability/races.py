"""Processes that want one run directory at once: `python benchmarks/reliability/races.py --races 100`. Wanted: one
winner each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from record import record

from tests.test_lock import race


def main() -> None:
    """Each race is over what the killed winner of the one before has left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    winners: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as run_dir:
        for _ in range(options.races):
            said = race(Path(run_dir), options.processes)
            winners[said.count("won")] += 1
            assert said.count("lost 73") == options.processes - said.count("won")
    record("start races", {"races": options.races, "processes": options.processes, "winners": dict(winners)})


if __name__ == "__main__":
    main()
