"""The environment of those who are measured beside: their versions are theirs, and nothing of ours is in it.

Made once under LLM_CACHE_DIR, with the same torch as here, and used again as long as torch and the wishes are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# litgpt without what it depends on: it wants an older huggingface_hub than transformers, for downloads alone.
WISHES = (
    "transformers>=5.17,<6",
    "accelerate>=1.10,<2",
    "lightning>=2.6.6,<2.7",
    "jsonargparse",
    "tensorboard>=2.21,<3",
)
BARE = ("litgpt==0.5.13",)


@dataclass(frozen=True)
class Peers:
    """A Python that can import the peers, and which of them there are."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)

    def has(self, *packages: str) -> bool:
        return all(package in self.versions for package in packages)


def here() -> Peers:
    """Those that happen to be installed in this environment: for the smoke test."""
    names = ("torch", "transformers", "accelerate", "lightning", "litgpt")
    return Peers(sys.executable, {n: metadata.version(n) for n in names if importlib.util.find_spec(n) is not None})


def peers(say: Callable[[str], None]) -> Peers:
    """Find or make the environment. Raises CalledProcessError if it cannot be made."""
    cache = Path(os.environ.get("LLM_CACHE_DIR", "~/.cache/llm-on-lightning")).expanduser()
    torch = metadata.version("torch")
    key = hashlib.sha256(json.dumps([torch, WISHES, BARE, sys.version]).encode()).hexdigest()[:12]
    folder = cache / "benchmarks" / f"peers-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"making the peers' environment in {folder}, once: some minutes")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # The very build if an index has it; else the release, which may be built for other devices, too.
        if subprocess.run([*pip, f"torch=={torch}"], check=False, stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*pip, f"torch=={torch.partition('+')[0]}"], check=True)
        subprocess.run([*pip, f"torch=={torch.partition('+')[0]}", *WISHES], check=True)
        subprocess.run([*pip, "--no-deps", *BARE], check=True)
        (folder / "complete").touch()
    return at(python)


def at(python: Path) -> Peers:
    """Those that an environment of somebody's own holds."""
    command = [str(python), "-m", "pip", "list", "--format=json"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    return Peers(str(python), {row["name"]: row["version"] for row in json.loads(listed.stdout)})
