"""How well a T5 translates that ours trained, beside one that transformers' Trainer trained on the same batches.

Both learn Multi30k (English to German) from the same weights for three epochs, with the model and the optimizer of
`encoder_decoder` at ten times its rate. One program, transformers' `generate`, then translates the test set of 2016 by
either network, greedily: nothing differs but the training. BLEU is sacrebleu's, with its intervals of 95 %; p is of its
paired bootstrap (Koehn 2004), small where the two differ.
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
from llm.tokenizer import Tokenizer

ORDER = 11
STEPS = 3 * 907  # epochs of 29,000 pairs, 32 a step
LR = 1e-3
N_TEST, N_BOOTSTRAP = 1000, 1000
# Two trainings whose sums are rounded differently are two draws: they end some tenths of a point apart.
EQUAL = Bar(">=", -1.0)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(session: Session) -> list[Row]:
    """BLEU of either, and what ours has more."""
    if not session.peers.has("transformers", "accelerate"):
        session.skip("transformers or accelerate is not installed")
        return []
    tokenizer, models = _trained(session)
    test = pairs(session, "test_2016_flickr", 4 if session.smoke else N_TEST)
    sources, references = ([*side] for side in zip(*test, strict=True))
    return _scored({name: _translated(session, models[name], tokenizer, sources) for name in models}, references)


def _trained(session: Session) -> tuple[Tokenizer, dict[str, Path]]:
    """Folders of transformers' of both networks, trained at the same time, a core each."""
    pace = {"steps": 1, "warmup": STEPS, "starts": 1}
    n_steps = session.n_steps(**pace)
    task = Translation.of(session, n_steps)
    models = {name: session.folder / name for name in ("ours", "transformers Trainer")}
    settings = {
        "kind": "encoder_decoder",
        "weights": str(task.weights / "theirs"),
        "steps": str(task.steps),
        "precision": "32-true",
        "adamw": ADAMW | {"lr": LR},
        "save": str(models["transformers Trainer"]),
    }
    run = [*task.run, f"optimizer.lr={LR}"]
    team = [
        ours("ours", run, n_steps, task.weights, steps=task.steps, checkpoints=True, environment=ONE_THREAD),
        contestant(session, "transformers Trainer", "trainer", session.peers.python, settings, environment=ONE_THREAD),
    ]
    # At this rate rounding grows tenfold within the twenty steps that are compared; `encoder_decoder` asks for 1e-4.
    options = {"hurried": True, "tolerance": 1e-2, "patience_s": 8 * 3600.0, "cpus": sorted(os.sched_getaffinity(0))}
    session.compete("training", team, **pace, **options)
    export_folder(session.folder / "training" / "0" / "run", models["ours"])
    return task.tokenizer, models


def _translated(session: Session, model: Path, tokenizer: Tokenizer, sources: Sequence[str]) -> list[str]:
    """What a network makes of the sources."""
    batches = []
    for first in range(0, len(sources), 50):
        rows = laid_out(tokenizer, list(sources[first : first + 50]), -1)
        batches.append({"input_ids": rows.where(rows >= 0, tokenizer.pad_id), "attention_mask": (rows >= 0).long()})
    given, out = session.folder / "sources.pt", model / "translations.json"
    torch.save(batches, given)
    command = [session.peers.python, "-m", "benchmarks.contestants.translate", str(model), str(given), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": import_path()})
    ends = (tokenizer.pad_id, tokenizer.eot_id)
    return [tokenizer.decode([each for each in ids if each not in ends]) for ids in json.loads(out.read_text())]


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
        Row("ours", "BLEU", _interval(mine), figures=figures),
        Row("transformers Trainer", "BLEU", _interval(theirs)),
        Row("ours - transformers Trainer", "BLEU", Spread(more, more, more), EQUAL, note=note),
    ]


def _interval(result: Any) -> Spread:
    """Of sacrebleu's Result."""
    return Spread(result.score, result.mean - result.ci, result.mean + result.ci)
