"""How often the host reads a number off the device (aten::_local_scalar_dense, which .item() calls) in a step that does
not flush its metrics.

Counted by a TorchDispatchMode around all that happens between two steps of train.py, with all callbacks and loggers, in
each family. The first steps are left out, in which things are set up.
"""

from __future__ import annotations

import json
import os
import subprocess

from benchmarks.contest import ContestError, Spread
from benchmarks.contestants.ours import ours
from benchmarks.machine import import_path
from benchmarks.material import SHARED, text_file
from benchmarks.measure import Bar, Row, Session

ORDER = 7
N_STEPS, FLUSH = 45, 10
BAR = Bar("<=", 0.0)
FAMILIES = {
    "decoder": [],
    "encoder": ["model=tiny_encoder", "objective=masked_lm", "data/tasks=masked_lm", "tokenizer=wordpiece"],
    "encoder-decoder": [
        "model=tiny_encoder_decoder",
        "objective=seq2seq",
        "data/tasks=span_denoising",
        "tokenizer=unigram",
        "tokenizer.n_sentinels=20",
    ],
}


def measure(session: Session) -> list[Row]:
    """The most in any step, and in those that flush."""
    rows = []
    text = text_file(session.folder, 60_000)
    for family in ("decoder",) if session.smoke else FAMILIES:
        if session.case not in family:
            continue
        counts = _counts(session, family, str(text))
        quiet = [count for step, count in counts.items() if step % FLUSH and step > 2]
        flushes = [count for step, count in counts.items() if not step % FLUSH]
        note = f"{max(flushes)} in a step that flushes"
        # One step with a sync is one too many: the most is judged, not the median.
        most = Spread(max(quiet), min(quiet), max(quiet))
        rows.append(Row(family, "most .item() a step", most, BAR, note=note, figures={"by_step": counts}))
    return rows


def _counts(session: Session, family: str, text: str) -> dict[int, int]:
    """Step, counted from 1 -> how often."""
    run = [
        "data=text",
        f"data.sources.text.path={text}",
        "tokenizer.vocab_size=300",
        *("model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.ffn_dim=64"),
        *("data.max_length=64", "data.batch_size=4", "data.micro_batch_size=2"),
        *("trainer.precision=32-true", "trainer.accelerator=cpu"),
        f"trainer.max_steps={N_STEPS}",
        f"callback.metrics.every_n_steps={FLUSH}",
        f"callback.ledger.every_n_steps={FLUSH}",
        *SHARED,
        *FAMILIES[family],
        "+callback.syncs={_target_: benchmarks.contestants.syncs.CountSyncs}",
    ]
    command = ours(family, run, N_STEPS, None, loggers=True).command
    command = [word for word in command if not word.startswith("+callback.turn=")]
    folder = session.folder / family
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": import_path(), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ContestError(f"{family} ended with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    counts: dict[str, int] = json.loads((folder / "syncs.json").read_text())
    return {int(step): count for step, count in counts.items()}
