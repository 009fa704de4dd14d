"""How well a T5 translates that ours trained, beside one that transformers' Trainer trained on the same batches.

Both learn Multi30k (English to German) from the same weights for five epochs, with the sizes and the optimizer of
`encoder_decoder` at a rate that falls to 0 (ours reaches it at the last step, Trainer's would at the next). One program
of transformers' then reads the test set of 2016 with either network: nothing differs but the training. Held-out loss
is of the translations that people made; BLEU is sacrebleu's of greedy ones, with its intervals of 95 %; p is of its
paired bootstrap (Koehn 2004), which knows that other sentences might have been drawn, and not that another rounding
makes another training.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Spread
from benchmarks.contestants.command import contestant
from benchmarks.contestants.ours import ours
from benchmarks.cpu.encoder_decoder import Translation, laid_out, pairs
from benchmarks.machine import import_path
from benchmarks.material import ADAMW
from benchmarks.measure import Bar, Row, Session
from llm.checkpoint import export_folder
from llm.objective.loss import IGNORED
from llm.tokenizer import Tokenizer

ORDER = 11
STEPS = 5 * 907  # epochs of 29,000 pairs, 32 a step
LR = 5e-4
# A head of its own, as T5 1.1 has, and a start at 0.02: after 400 steps a training loss of 3.4, where that of the first
# T5 under AdamW is 3.8. Its rounding grows faster, so that for `encoder_decoder` the first is the better one.
UNTIED = {"tie_embeddings": False, "scale_logits": False, "initialisation": "llama"}
N_TEST, N_BOOTSTRAP = 1000, 1000
# Two trainings whose sums are rounded differently are two draws: at this little training they end up to a point apart.
EQUAL, AS_LIKELY = Bar(">=", -1.0), Bar("<=", 0.02)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(session: Session) -> list[Row]:
    """BLEU of either, and what ours has more."""
    if not session.peers.has("transformers", "accelerate"):
        session.skip("transformers or accelerate is not installed")
        return []
    tokenizer, models = _trained(session)
    return judged(session, tokenizer, models)


def judged(session: Session, tokenizer: Tokenizer, models: Mapping[str, Path]) -> list[Row]:
    """Rows of both folders of transformers', `ours` and `transformers Trainer`."""
    test = pairs(session, "test_2016_flickr", 4 if session.smoke else N_TEST)
    told = {name: _read_by(session, folder, tokenizer, test) for name, folder in models.items()}
    nats = [told[name]["nats"] for name in ("ours", "transformers Trainer")]
    rows = [
        Row("ours: held-out loss", "nats", Spread.of(nats[:1])),
        Row("transformers Trainer: held-out loss", "nats", Spread.of(nats[1:])),
        Row("ours - transformers Trainer: held-out loss", "nats", Spread.of([nats[0] - nats[1]]), AS_LIKELY),
    ]
    ends = (tokenizer.pad_id, tokenizer.eot_id)
    texts = {
        name: [tokenizer.decode([each for each in ids if each not in ends]) for ids in found["ids"]]
        for name, found in told.items()
    }
    return rows + _scored(texts, [reference for _, reference in test])


def _trained(session: Session) -> tuple[Tokenizer, dict[str, Path]]:
    """Folders of transformers' of both networks, trained at the same time, a core each."""
    pace = {"steps": 1, "warmup": STEPS, "starts": 1}
    n_steps = session.n_steps(**pace)
    task = Translation.of(session, n_steps, **UNTIED)
    models = {name: session.folder / name for name in ("ours", "transformers Trainer")}
    settings = {
        "kind": "encoder_decoder",
        "weights": str(task.weights / "theirs"),
        "steps": str(task.steps),
        "precision": "32-true",
        "adamw": ADAMW | {"lr": LR},
        "schedule": "linear",
        "save": str(models["transformers Trainer"]),
    }
    run = [*task.run, f"optimizer.lr={LR}", "schedule=linear", "schedule.warmup_steps=0"]
    team = [
        ours("ours", run, n_steps, task.weights, steps=task.steps, checkpoints=True, environment=ONE_THREAD),
        contestant(session, "transformers Trainer", "trainer", session.peers.python, settings, environment=ONE_THREAD),
    ]
    # At this rate rounding grows many times within the twenty steps that are compared; `encoder_decoder` asks for 1e-4.
    options = {"hurried": True, "tolerance": 1e-2, "patience_s": 8 * 3600.0, "cpus": sorted(os.sched_getaffinity(0))}
    session.compete("training", team, **pace, **options)
    export_folder(session.folder / "training" / "0" / "run", models["ours"])
    return task.tokenizer, models


def _read_by(session: Session, model: Path, tokenizer: Tokenizer, test: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What `translate` tells of a network."""
    batches = []
    for first in range(0, len(test), 50):
        sources, references = ([*side] for side in zip(*test[first : first + 50], strict=True))
        rows, labels = laid_out(tokenizer, sources, -1), laid_out(tokenizer, references, IGNORED)
        source = {"input_ids": rows.where(rows >= 0, tokenizer.pad_id), "attention_mask": (rows >= 0).long()}
        batches.append({**source, "labels": labels})
    given, out = session.folder / "test.pt", model / "translations.json"
    torch.save(batches, given)
    command = [session.peers.python, "-m", "benchmarks.contestants.translate", str(model), str(given), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": import_path()})
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _scored(translations: Mapping[str, Sequence[str]], references: Sequence[str]) -> list[Row]:
    """Of sacrebleu's paired test; the first of its systems is the one that the other is compared with."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    systems = [
        ("transformers Trainer", list(translations["transformers Trainer"])),
        ("ours", list(translations["ours"])),
    ]
    metric = BLEU(references=[list(references)])
    _, scores = PairedTest(systems, {"BLEU": metric}, None, test_type="bs", n_samples=N_BOOTSTRAP)()
    theirs, mine = scores["BLEU"]
    more = mine.score - theirs.score
    same = sum(a == b for a, b in zip(*(texts for _, texts in systems), strict=True))
    note = f"p = {mine.p_value:.2f}; {same} of {len(references)} translations are the same"
    figures = {"signature": str(metric.get_signature()), "p": mine.p_value}
    return [
        Row("ours: BLEU", "BLEU", _interval(mine), figures=figures),
        Row("transformers Trainer: BLEU", "BLEU", _interval(theirs)),
        Row("ours - transformers Trainer: BLEU", "BLEU", Spread.of([more]), EQUAL, note=note),
    ]


def _interval(result: Any) -> Spread:
    """Of sacrebleu's Result."""
    return Spread(result.score, result.mean - result.ci, result.mean + result.ci)
