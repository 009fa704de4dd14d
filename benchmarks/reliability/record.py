"""Where the figures of this folder go: one file, with the commit, the date and the machine of each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")


def record(name: str, figures: dict[str, Any]) -> None:
    """Put the figures of one command beside those of the others, and print them."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"
    when = datetime.now(UTC).date().isoformat()
    results[name] = {**figures, "commit": commit, "date": when, "machine": machine}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps({name: figures}, indent=1))
