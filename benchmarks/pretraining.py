"""The three families on real text: `python benchmarks/pretraining.py TEXT.jsonl --minutes 10`.

Each run is `python train.py` with its experiment and as many steps as fit into the minutes, told from the speed of a
short run before it. What came of them goes to benchmarks/results/pretraining.json and, as curves, to
docs/pretraining.png; docs/results.md shows both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretraining.json"
PICTURE = ROOT / "docs" / "pretraining.png"
# Name -> what is trained, and how many nats per token below the unigram it is to reach.
RUNS: dict[str, tuple[list[str], float]] = {
    "causal LM": (["experiment=gpt_pretrain", "callback.sample.prompts=['It was a dark night, and']"], 1.5),
    "masked LM + NSP": (["experiment=bert_pretrain", "callback.sample.prompts=['It was a dark [MASK], and I']"], 1.0),
    "span denoising": (["experiment=t5_pretrain", "callback.sample.prompts=['It was a <extra_id_0>, and I']"], 0.7),
}
SETTINGS = ["data=files", "logger=none", "trainer.limit_val_batches=20", "callback.metrics.every_n_steps=10"]
_CALIBRATION_STEPS = 40


def documents(source: Path, target: Path) -> None:
    """A chapter of a book or any other row is one document; a row's `paragraphs` are joined by blank lines."""
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
        for line in rows:
            row = json.loads(line)
            text = row["text"] if "text" in row else "\n\n".join(row["paragraphs"])
            out.write(json.dumps({"text": text}) + "\n")


def train(overrides: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run."""
    subprocess.run([sys.executable, "train.py", f"run_dir={run_dir}", *overrides], cwd=ROOT, check=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def n_steps(overrides: list[str], run_dir: Path, minutes: float) -> int:
    """Steps that take so many minutes, by the second half of a short run."""
    rows = train(
        [*overrides, f"trainer.max_steps={_CALIBRATION_STEPS}", "~callback.sample", "data.val_every=null"], run_dir
    )
    first, last = (next(r for r in rows if r["step"] == step) for step in (_CALIBRATION_STEPS // 2, _CALIBRATION_STEPS))
    seconds = (last["tokens"] - first["tokens"]) / last["speed/tokens_per_s"] / (last["step"] - first["step"])
    return int(minutes * 60 / seconds)


def measured(overrides: list[str], run_dir: Path, steps: int) -> dict[str, Any]:
    """A run, and what it came to."""
    length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, steps // 8)}"]
    rows = train([*overrides, *length], run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    last = [row for row in rows if "val/loss" in row][-1]
    words = ["python", "train.py", *overrides, *length]
    return {
        "command": [f"{word.partition('=')[0]}=…" if str(run_dir.parent) in word else word for word in words],
        "below_unigram": summary["baselines"]["unigram/loss"] - last["val/loss"],
        "summary": summary,
        "validation": last,
        "samples": (run_dir / "samples.txt").read_text().splitlines()[-3:],
        "rows": [{key: row[key] for key in ("step", "tokens", "train/loss", "val/loss") if key in row} for row in rows],
    }


def drawn(results: dict[str, Any], picture: Path) -> None:
    """A picture of training and validation loss of each run, and its unigram."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for key, style in (("train/loss", "-"), ("val/loss", "o-")):
            points = [(row["tokens"] / 1e6, row[key]) for row in result["rows"] if key in row]
            axis.plot(*zip(*points, strict=True), style, label=key, linewidth=1, markersize=4)
        axis.axhline(result["summary"]["baselines"]["unigram/loss"], color="grey", linestyle="--", label="unigram")
        axis.set(title=name, xlabel="million tokens", ylabel="nats per predicted token")
        axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Every run, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="JSON lines, maybe .gz, with `text` or `paragraphs`")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each run")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        documents(options.text, path)
        for number, name in enumerate(options.only):
            what, wanted = RUNS[name]
            overrides = [*what, *SETTINGS, f"data.path={path}"]
            steps = n_steps(overrides, Path(folder) / f"calibration{number}", options.minutes)
            result = measured(overrides, Path(folder) / f"run{number}", steps)
            results[name] = {"wanted_below_unigram": wanted, **result}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    drawn(results, PICTURE)


if __name__ == "__main__":
    main()
