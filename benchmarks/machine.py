"""What a figure was measured on, and whether the machine was quiet."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUIET = 0.15  # cores that others may keep busy
_PACKAGES = ("torch", "lightning", "transformers", "accelerate", "litgpt", "numpy")


def import_path() -> str:
    """PYTHONPATH of processes that are started: this checkout, before what the user's own says."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def busy_s() -> float:
    """Seconds that all cores together were busy since the machine started."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def busy_cores(seconds: float = 3.0) -> float:
    """How many cores work while this process sleeps."""
    before, start = busy_s(), time.monotonic()
    time.sleep(seconds)
    return (busy_s() - before) / (time.monotonic() - start)


def refusal(busy: float, quiet: float = QUIET) -> str | None:
    """Why nothing is to be measured now; None if something may."""
    if busy <= quiet:
        return None
    return (
        f"other programs keep {busy:.2f} cores busy, and {quiet} are allowed: figures of a loaded machine mislead; "
        "wait, or give --loaded, which marks the result"
    )


def cpu_name() -> str:
    """As the kernel calls the first core."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed() -> dict[str, str]:
    """Package -> version, of this environment."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def about() -> dict[str, Any]:
    """The machine, the instructions that torch uses of it, the commit, the time and the load."""
    import torch

    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    cores, instructions = len(os.sched_getaffinity(0)), torch.backends.cpu.get_cpu_capability()
    return {
        "machine": f"{cpu_name()}, {cores} cores, {instructions}, Linux {platform.release()}",
        "python": platform.python_version(),
        "versions": installed(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
    }
