"""Speed, side by side: `python benchmarks/run.py [cpu|gpu] [measure …]`; no measure: all of that device.

What is measured beside us runs in processes of its own, turn by turn, pinned to as many cores as threads, with the same
weights on the same batches; losses are compared first, so that the work is equal (`contest`). Every measure is a module
of benchmarks/cpu or benchmarks/gpu, with its bar beside it (`measure` says how to add one). Results go to
benchmarks/results/DEVICE.json, .md and .png, with versions, machine, commit and load. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, report
from benchmarks.contest import ContestError
from benchmarks.measure import Row, Session, measures
from benchmarks.peers import Peers, at, here, peers

ROOT = machine.ROOT
RESULTS = ROOT / "benchmarks" / "results"

GPU_S = 570.0  # all that is measured on a GPU in one go, unless the command says otherwise


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("device", nargs="?", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("measure", nargs="*", help="names of modules in benchmarks/cpu or benchmarks/gpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of every contestant, each on a core of its own")
    parser.add_argument("--case", default="", help="of a measure with several cases, those with this in their names")
    parser.add_argument("--loaded", action="store_true", help="measure on a loaded machine, and mark the result")
    parser.add_argument("--smoke", action="store_true", help="all of it tiny, in a minute; writes no results")
    parser.add_argument("--rehearse", action="store_true", help="gpu: every part on the CPU, tiny; writes no results")
    parser.add_argument("--seconds", type=float, default=GPU_S, help="gpu: after so long no other part is begun")
    parser.add_argument("--peers", type=Path, default=None, help="Python of an environment that holds the peers")
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data", help="folder of real text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--keep", type=Path, default=None, help="keep what contestants wrote in this folder")
    return parser.parse_args()


def chosen(device: str, names: list[str]) -> dict[str, Any]:
    """The measures asked for. Exits with the names there are if one is unknown."""
    known = measures(device)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"benchmarks/run.py: no measure {', '.join(unknown)} for {device}; there are {', '.join(known)}")
    return {name: known[name] for name in known if not names or name in names}


def main() -> None:
    """Measure, print, write. Exits with 1 if a measure failed; a missed bar is a result."""
    given = options()
    small = given.smoke or given.rehearse
    wanted = chosen(given.device, given.measure)
    busy = 0.0 if small else machine.busy_cores()
    why = machine.refusal(busy)
    if why is not None and not given.loaded:
        sys.exit(f"benchmarks/run.py: {why}")
    on_gpu = given.device == "gpu" and not small
    cpus = sorted(os.sched_getaffinity(0))[0 if small or on_gpu else -given.threads :]
    needed = given.device == "cpu" and not small
    others: Peers = at(given.peers) if given.peers else peers(_say) if needed else here()
    rounds = 2 if small else min(3, given.rounds) if on_gpu else given.rounds
    deadline = time.monotonic() + given.seconds if on_gpu else None
    results: dict[str, list[Row]] = {}
    record: dict[str, dict[str, Any]] = {}
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, module in wanted.items():
            _say(f"{name}: {_heading(module)}")
            folder = (given.keep or Path(scratch)) / name
            device = "cuda" if on_gpu else "cpu"
            session = Session(folder, given.data, others, cpus, rounds, small, device, deadline, given.case, say=_say)
            folder.mkdir(parents=True, exist_ok=True)
            about = machine.about()
            try:
                results[name] = module.measure(session)
            except ContestError as error:
                failed.append(name)
                _say(f"{name}: {error}")
                continue
            except Exception:
                failed.append(name)
                traceback.print_exc()
                continue
            record[name] = {
                "heading": _heading(module),
                "about": about | {"threads": given.threads, "rounds": rounds, "peers": others.versions},
                "loaded": why is not None or session.disturbed,
                "skipped": session.skipped,
                "rows": report.recorded(results[name]),
            }
            print(report.table({name: results[name]}), flush=True)
            if not small:
                report.write(given.results, given.device, record, part=bool(given.case))
        if small:  # the same code, and nothing written over
            report.write(Path(scratch) / "results", given.device, record)
    if len(wanted) > 1:
        print(report.table(results))
    if failed:
        sys.exit(f"benchmarks/run.py: failed: {', '.join(failed)}")


def _heading(module: Any) -> str:
    """The first sentence of the measure's docstring."""
    return " ".join((module.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
