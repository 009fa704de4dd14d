"""Damage of every kind to the newest checkpoint, at random places:
`python benchmarks/reliability/corruption.py --trials 200`. Wanted: all of it detected, the file named, and the
checkpoint before it used.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from record import record

from llm.checkpoint import newest_verified, save, step_name

FILES = ["MANIFEST.json", "index.json", "tensors-00000.safetensors", "trainer.pt", "config.yaml"]
Damage = Callable[[random.Random, Path, Path], str]  # newest and older step -> the file that must be named


def _change(draw: random.Random, step: Path, change: Callable[[bytearray], None]) -> str:
    file = step / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    change(content)
    assert content != file.read_bytes()
    file.write_bytes(content)
    return file.name


def truncated(draw: random.Random, step: Path, older: Path) -> str:
    return _change(draw, step, lambda content: content.__delitem__(slice(draw.randrange(len(content)), None)))


def bit_flipped(draw: random.Random, step: Path, older: Path) -> str:
    def flip(content: bytearray) -> None:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)

    return _change(draw, step, flip)


def block_zeroed(draw: random.Random, step: Path, older: Path) -> str:
    def zero(content: bytearray) -> None:
        nonzero = [at for at, byte in enumerate(content) if byte]
        at = draw.choice(nonzero)
        content[at : at + 512] = bytes(len(content[at : at + 512]))

    return _change(draw, step, zero)


def missing(draw: random.Random, step: Path, older: Path) -> str:
    file = step / draw.choice(FILES)
    file.unlink()
    return file.name


def swapped(draw: random.Random, step: Path, older: Path) -> str:
    one, two = (step / name for name in draw.sample(FILES[1:], 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return one.name


def from_the_older_step(draw: random.Random, step: Path, older: Path) -> str:
    name = draw.choice([name for name in FILES if (step / name).read_bytes() != (older / name).read_bytes()])
    shutil.copyfile(older / name, step / name)
    return name


def manifest_edited(draw: random.Random, step: Path, older: Path) -> str:
    manifest = json.loads((step / "MANIFEST.json").read_text())
    entry = manifest["files"][draw.choice(sorted(manifest["files"]))]
    key = draw.choice(["size", "sha256", "step", "seal"])
    if key in entry:
        entry[key] = entry[key] + 1 if key == "size" else entry[key][::-1]
    elif key == "step":
        manifest["step"] -= 1
    else:
        manifest["sha256"] = manifest["sha256"][::-1]
    (step / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    return "MANIFEST.json"


def another_file(draw: random.Random, step: Path, older: Path) -> str:
    name = f"more-{draw.randrange(100)}"
    (step / name).write_bytes(draw.randbytes(draw.randrange(100)))
    return name


KINDS: list[Damage] = [
    *(truncated, bit_flipped, block_zeroed, missing, swapped, from_the_older_step, manifest_edited, another_file)
]


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, entry: logging.LogRecord) -> None:
        self.text = entry.getMessage()


def main() -> None:
    """So many trials of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    draw, said = random.Random(0), _Said()
    logging.getLogger("llm").addHandler(said)
    logging.getLogger("llm").propagate = False
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        template, run_dir = Path(scratch) / "template", Path(scratch) / "run"
        template.mkdir()
        for step in (1, 2):
            (template / "config.yaml").write_text(f"model:\n  n: {step}\n")
            tensors = {f"weight{step}": torch.randn(100, 100), "number": torch.tensor(step)}
            state = {"step": step, "rng": torch.randint(0, 255, (1000,))}
            save(template / "checkpoints" / step_name(step), tensors, state, [template / "config.yaml"])
        for kind in KINDS:
            detected = named = 0
            for _ in range(trials):
                shutil.rmtree(run_dir, ignore_errors=True)
                shutil.copytree(template, run_dir)
                older, newest = (run_dir / "checkpoints" / step_name(step) for step in (1, 2))
                file = kind(draw, newest, older)
                detected += newest_verified(run_dir) == older
                named += file in said.text
            counts[kind.__name__] = {"trials": trials, "detected, older one used": detected, "file named": named}
    record("corruption", counts)


if __name__ == "__main__":
    main()
