"""Fine-tuning on real data: `python benchmarks/finetuning.py DATA --minilm FOLDER --smollm2 RUN --runs OUT`.

Each run is `python train.py` with an experiment and DATA's files, then `python -m llm evaluate` on rows that it has not
seen. A run or an evaluation that is in OUT already is not done again. What came of them goes to
benchmarks/results/finetuning.json and, as curves, to docs/finetuning.png; docs/results.md shows both.

DATA has a folder for each set (`cls_banking77/train.jsonl.gz` …); MiniLM is a folder of Hugging Face's, SmolLM2 a run
that `python -m llm import` made.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "finetuning.json"
PICTURE = ROOT / "docs" / "finetuning.png"
M30K = "{data}/mt_multi30k"
BLEU = ["--n-beams=5", "--max-new-tokens=80", "--metric=bleu", "--metric=chrf"]
ENCODER = ["init_from={minilm}", "schedule=linear", "schedule.warmup_steps=20", "trainer.max_epochs=null"]
LORA = [
    *("init_from={smollm2}", "data=files", "data.max_length=256", "data.micro_batch_size=2", "trainer.max_epochs=null"),
    *("schedule=linear", "schedule.warmup_steps=5", "trainer.limit_val_batches=4"),
]


@dataclass(frozen=True)
class Recipe:
    """A run and how it is judged: the number that is drawn, and name -> arguments of each evaluation. `mean_of` that
    many last checkpoints is evaluated instead of the last; `before` says to evaluate what it started from, too."""

    train: list[str]
    drawn: str
    evaluations: dict[str, list[str]] = field(default_factory=dict)
    mean_of: int | None = None
    before: bool = False


def _pairs(split: str) -> str:
    return "{{en:" + f"{M30K}/{split}.en.gz,de:{M30K}/{split}.de.gz" + "}}"


def _labels(folder: str, *names: str) -> list[str]:
    """A text with one of two labels, by the experiment for pairs."""
    task = "data.tasks.classification"
    shape = [f"{task}.text='{{{{text}}}}'", f"{task}.second=null", f"{task}.labels=[{','.join(names)}]"]
    return ["experiment=classify_pairs", *ENCODER, "data=files", f"data.path={{data}}/{folder}/train.jsonl.gz", *shape]


RECIPES = {
    "m30k": Recipe(
        [
            *("experiment=translate_multi30k", "data=lines", f"data.sources.lines.paths={_pairs('train')}"),
            f"data.sources.lines.val_paths={_pairs('val')}",
        ],
        "val/bleu",
        {
            f"test{year}": [f"data.sources.lines.val_paths={_pairs(f'test_{year}_flickr')}", *BLEU]
            for year in (2016, 2017)
        },
        mean_of=5,
    ),
    "banking": Recipe(
        [
            *("experiment=classify_banking77", *ENCODER, "data=files", "data.path={data}/cls_banking77/train.jsonl.gz"),
            *("data.tasks.classification.label=label", "optimizer.lr=6e-4", "trainer.max_steps=600"),
        ],
        "val/accuracy",
        {"test": ["data.path={data}/cls_banking77/test.jsonl.gz"]},
    ),
    "polarity": Recipe(
        [
            *_labels("cls_sentence_polarity", "neg", "pos"),
            *("optimizer.lr=1.5e-4", "trainer.max_steps=140", "trainer.val_check_interval=70"),
        ],
        "val/accuracy",
        {"test": ["data.path={data}/cls_sentence_polarity/test.jsonl.gz"]},
    ),
    "cola": Recipe(
        [
            *_labels("cls_cola", "unacceptable", "acceptable"),
            *("data.batch_size=8", "optimizer.lr=2e-4", "trainer.max_steps=200", "trainer.val_check_interval=100"),
        ],
        "val/mcc",
        {"test": ["data.path={data}/cls_cola/test.jsonl.gz"]},
    ),
    "squad": Recipe(
        [
            *(
                "experiment=qa_squad",
                *ENCODER[:2],
                "trainer.max_epochs=null",
                "data=files",
                "data.path={data}/qa_squadshifts_newwiki/train.jsonl.gz",
            ),
            *("schedule.warmup_steps=30", "data.max_length=256", "data.batch_size=16", "optimizer.lr=2e-4"),
            *("trainer.max_steps=560", "trainer.val_check_interval=280"),
        ],
        "val/accuracy",
        {
            "test": ["data.path={data}/qa_squadshifts_newwiki/test.jsonl.gz"],
            "xquad": ["data.path={data}/qa_xquad_en/test.jsonl.gz"],
        },
    ),
    "debian": Recipe(
        [
            *("experiment=lora_smollm2", *LORA, "data.path={data}/sum_debian_desc/train.jsonl.gz"),
            'data.tasks.prompt.prompt="Package description:\n{{document}}\nSummary:"',
            "data.tasks.prompt.answer=' {{summary}}'",
            *("trainer.max_steps=30", "trainer.val_check_interval=15"),
        ],
        "val/loss",
        {
            "test": [
                *("data.path={data}/sum_debian_desc/test.jsonl.gz", "--metric=rouge", "--max-new-tokens=30"),
                "--limit=200",
            ]
        },
    ),
    "scitldr": Recipe(
        [
            *("experiment=lora_smollm2", *LORA, "data.path={runs}/scitldr.train.jsonl", "data.max_length=512"),
            'data.tasks.prompt.prompt="{{document}}\nTL;DR:"',
            "data.tasks.prompt.answer=' {{summary}}'",
            *("data.micro_batch_size=1", "trainer.max_steps=25", "trainer.val_check_interval=25"),
        ],
        "val/loss",
        {
            "test": [
                *("data.path={runs}/scitldr.test.jsonl", "--metric=rouge", "--max-new-tokens=40", "--limit=100"),
                "--batch-size=4",
            ]
        },
    ),
    "gsm8k": Recipe(
        [
            *("experiment=lora_smollm2", *LORA, "data.path={data}/ins_gsm8k/train.jsonl.gz"),
            *("trainer.max_steps=20", "trainer.val_check_interval=10"),
        ],
        "val/loss",
        {"wikitext": ["task=perplexity", "data.path={runs}/wikitext.jsonl", "--batch-size=4"]},
        before=True,
    ),
    "dpo": Recipe(
        [
            *("experiment=dpo", *LORA, "adapter=lora", "optimizer.lr=2e-4", "data.batch_size=8"),
            *("data.path={runs}/pairs.jsonl", "trainer.max_steps=12", "trainer.val_check_interval=6"),
        ],
        "val/accuracy",
    ),
}


def material(data: Path, runs: Path) -> None:
    """Files that the sets have in another form: the first four articles of WikiText-2's test part, answers of Code
    Alpaca, each beside the answer to another instruction, and the first of SciTLDR's summaries of each paper."""
    with gzip.open(data / "lm_wikitext2_validtest" / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        articles = [text for text in re.split(r"\n(?= = [^=])", file.read()) if len(text) > 500][:4]
    _write(runs / "wikitext.jsonl", [{"text": text} for text in articles])
    with gzip.open(data / "ins_codealpaca2k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [r for r in rows if len(r["output"]) > 20 and sum(map(len, r.values())) < 500]
    others = [*rows[1:], rows[0]]
    pairs = [
        {
            "prompt": row["instruction"] + ("\n" + row["input"] if row["input"] else ""),
            "chosen": row["output"],
            "rejected": other["output"],
        }
        for row, other in zip(rows, others, strict=True)
    ]
    random.Random(0).shuffle(pairs)
    _write(runs / "pairs.jsonl", pairs)
    for split in ("train", "test"):
        with gzip.open(data / "sum_scitldr" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            papers = [json.loads(line) for line in file]
        firsts = [{"document": paper["document"], "summary": paper["summaries"][0]} for paper in papers]
        _write(runs / f"scitldr.{split}.jsonl", firsts)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def done(recipe: Recipe, name: str, places: dict[str, str], runs: Path) -> dict[str, Any]:
    """Train and evaluate, where that is not done; gives what came of it."""
    run = runs / name
    overrides = [text.format(**places) for text in recipe.train]
    if not (run / "summary.json").exists():
        _python(["train.py", *overrides, "logger=none", f"run_dir={run}"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = run
    if recipe.mean_of is not None:
        judged = runs / f"{name}-mean"
        if not judged.exists():
            _python(["-m", "llm", "average", str(run), str(judged), "--last", str(recipe.mean_of)])
    judgements = [(label, judged, arguments) for label, arguments in recipe.evaluations.items()]
    if recipe.before:
        judgements += [(f"{label}-before", places["smollm2"], given) for label, _, given in judgements]
    scores = {}
    for label, judged, arguments in judgements:
        out = runs / f"{name}.{label}.jsonl"
        if not out.with_suffix(".scores.json").exists():
            given = [text.format(**places) for text in arguments]
            _python(["-m", "llm", "evaluate", str(judged), *given, "--bootstrap=500", f"--out={out}"])
        scores[label] = json.loads(out.with_suffix(".scores.json").read_text())
    return {
        "overrides": recipe.train,
        "summary": json.loads((run / "summary.json").read_text()),
        "validations": [row for row in rows if any(key.startswith("val/") for key in row)],
        "losses": [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row],
        "scores": scores,
    }


def drawn(results: dict[str, Any], picture: Path) -> None:
    """The training loss of each run, and over it what validation found."""
    import matplotlib.pyplot as plt

    names = [name for name in RECIPES if name in results]
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(3.6 * -(-len(names) // 2), 6), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        result, key = results[name], RECIPES[name].drawn
        axis.plot(*zip(*result["losses"], strict=True), linewidth=1, color="tab:blue")
        axis.set(title=name, xlabel="step")
        axis.set_ylabel("training loss", color="tab:blue")
        found = [(row["step"], row[key]) for row in result["validations"] if key in row]
        if found:
            other = axis.twinx()
            other.plot(*zip(*found, strict=True), "o-", color="tab:orange")
            other.set_ylabel(key, color="tab:orange")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


def _python(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def main() -> None:
    """Each of them, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--minilm", type=Path, required=True, help="folder of MiniLM's weights")
    parser.add_argument("--smollm2", type=Path, required=True, help="run with SmolLM2's weights")
    parser.add_argument("--runs", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    options = parser.parse_args()
    places = {name: str(getattr(options, name).resolve()) for name in ("data", "minilm", "smollm2", "runs")}
    material(Path(places["data"]), Path(places["runs"]))
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        results[name] = done(RECIPES[name], name, places, Path(places["runs"]))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    drawn(results, PICTURE)


if __name__ == "__main__":
    main()
