"""What a save costs: `python benchmarks/reliability/saves.py`.

At 10 and 100 million parameters with AdamW's two moments, in float32: how long a step is held up by a save that waits,
and by one in the background; and how fast one core verifies what was written.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

from llm.checkpoint import manifest, newest
from llm.strategy import Stored
from tests.runs import run_composed

SIZES = {
    "10M": ["model.dim=384", "model.n_layers=6", "model.n_heads=6", "model.ffn_dim=1536"],
    "100M": ["model.dim=896", "model.n_layers=10", "model.n_heads=14", "model.ffn_dim=3808"],
}
N_SAVES = 5


def blocked_ms(scratch: Path, size: str, background: bool) -> list[float]:
    """Milliseconds that each save takes of the loop; the last, which ends the run, waits for its thread."""
    found: list[float] = []
    save = Stored.save_checkpoint

    def timed(self: Stored, *arguments: Any, **options: Any) -> None:
        self.finish_saving()  # of the one before: a run saves seldom enough for that to be done
        began = time.perf_counter()
        save(self, *arguments, **options)
        found.append(1e3 * (time.perf_counter() - began))

    Stored.save_checkpoint = timed  # type: ignore[method-assign]
    try:
        run_composed(
            [
                *SIZES[size],
                f"data.path={scratch / 'text.txt'}",
                f"data.cache_dir={scratch / 'cache'}",
                f"run_dir={scratch / f'{size}-{background}'}",
                "data.val_every=null",
                "data.batch_size=1",
                "data.micro_batch_size=1",
                f"trainer.max_steps={N_SAVES}",
                "~callback.sample",
                "~callback.summary",
                "callback.checkpoint.every_n_train_steps=1",
                f"callback.checkpoint.background={str(background).lower()}",
            ]
        )
    finally:
        Stored.save_checkpoint = save  # type: ignore[method-assign]
    return found[:N_SAVES]


def verified_gb_per_s(step: Path) -> tuple[float, float]:
    """Gigabytes, and how many of them one core verifies in a second; files in the page cache."""
    n_bytes = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            assert manifest.problems(step) == []
            times.append(time.perf_counter() - began)
    finally:
        os.sched_setaffinity(0, cores)
    return n_bytes / 1e9, n_bytes / 1e9 / min(times)


def main() -> None:
    """Both sizes, both ways."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "text.txt").write_text("some text to train on, of no consequence\n\n" * 200)
        for size in SIZES:
            blocked = {name: blocked_ms(scratch, size, name == "background") for name in ("waiting", "background")}
            step = newest(scratch / f"{size}-True")
            assert step is not None
            n_gb, speed = verified_gb_per_s(step)
            figures[size] = {
                "checkpoint, GB": round(n_gb, 3),
                **{f"blocked, {name}, ms": round(statistics.median(ms), 1) for name, ms in blocked.items()},
                "verified, GB/s on one core": round(speed, 2),
            }
    record("saves", figures)


if __name__ == "__main__":
    main()
