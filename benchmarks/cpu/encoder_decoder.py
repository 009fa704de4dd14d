"""A T5 on translation pairs, beside transformers' Trainer over its T5 with the same weights and batches.

English to German of Multi30k where it is at hand, else made-up pairs of as many words. Pairs in the corpus's order,
each in a row of its own, padded to the longest of the step: batches that both can read. Target tokens per CPU-second.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.contestants.command import plain, theirs
from benchmarks.contestants.ours import ours
from benchmarks.material import SHARED, model_overrides, n_real, save_steps, save_weights, tokenizer_of, vocabulary
from benchmarks.measure import Bar, Row, Session
from llm.model import TransformerConfig
from llm.objective.loss import IGNORED
from llm.tokenizer import Tokenizer

ORDER = 5
STEPS = 10
ROWS = 32
BAR = Bar(">=", 1.0)


def measure(session: Session) -> list[Row]:
    """Ours over theirs, and over a plain loop."""
    task = Translation.of(session, session.n_steps(STEPS))
    config, weights, steps, work = task.config, task.weights, task.steps, task.work
    fields = ("documents", "positions")
    team = [
        ours("ours", task.run, len(work), weights, steps=steps, work=work),
        plain(session, "plain loop", config, weights, steps, "32-true", fields=fields, work=work),
    ]
    trained = session.peers.has("transformers", "accelerate")
    if trained:
        named = "transformers Trainer"
        team.append(theirs(session, named, "trainer", "encoder_decoder", weights, steps, "32-true", work=work))
    else:
        session.skip("transformers Trainer: transformers or accelerate is not installed")
    outcome = session.compete("translation", team, steps=STEPS)
    found = [
        Row("ours", "target tokens/CPU-s", outcome.rate("ours"), figures=outcome.figures()),
        Row("ours / plain loop", "x", outcome.ratio("ours", "plain loop")),
    ]
    if trained:
        found.insert(0, Row("ours / transformers Trainer", "x", outcome.ratio("ours", "transformers Trainer"), BAR))
    return found


@dataclass(frozen=True)
class Translation:
    """What all contestants get: a model, its weights and its batches.

    run       overrides of a run of ours
    weights   what `material.save_weights` wrote
    steps     what `material.save_steps` wrote
    work      target tokens of each step
    """

    run: list[str]
    config: TransformerConfig
    tokenizer: Tokenizer
    weights: Path
    steps: Path
    work: list[float]

    @classmethod
    def of(cls, session: Session, n_steps: int, **other: Any) -> Translation:
        """Of `n_steps` batches of training pairs; of the model's settings `other` ones than `_config` has."""
        rows = 4 if session.smoke else ROWS
        found = pairs(session, "train", n_steps * rows)
        text = session.folder / "text.txt"
        text.write_text("\n\n".join(side for pair in dict.fromkeys(found) for side in pair), encoding="utf-8")
        run = [
            "data/tasks=span_denoising",
            "objective=seq2seq",
            "data=text",
            f"data.sources.text.path={text}",
            "tokenizer=unigram",
            f"tokenizer.vocab_size={200 if session.smoke else 4096}",
            "tokenizer.n_sentinels=20",
            "data.max_length=128",
            f"data.batch_size={rows}",
            "data.micro_batch_size=null",
            f"trainer.max_steps={n_steps}",
            "trainer.precision=32-true",
            "trainer.accelerator=cpu",
            "model=t5_small",
            *SHARED,
        ]
        config = replace(_config(vocabulary(run), small=session.smoke), **other)
        tokenizer, theirs_too = tokenizer_of(run), session.peers.has("transformers")
        weights = save_weights(config, session.folder / "weights", theirs=theirs_too, tokenizer=tokenizer)
        loaded = list(_steps(found, rows, tokenizer))
        steps, work = save_steps(loaded, session.folder / "steps.pt"), n_real(loaded)
        return cls([*run, *model_overrides(config)], config, tokenizer, weights, steps, work)


def pairs(session: Session, split: str, n: int) -> list[tuple[str, str]]:
    """English and German of Multi30k's `split`, from the beginning again when all are read; made-up ones where the
    corpus is not at hand."""
    folder = session.data / "mt_multi30k"
    if session.smoke or not folder.exists():
        draw = random.Random(split)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(500)]
        sides = (" ".join(draw.choices(words, k=draw.randint(6, 20))) for _ in range(2 * n))
        return list(zip(sides, sides, strict=False))
    lines = []
    for language in ("en", "de"):
        with gzip.open(folder / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
            lines.append(file.read().splitlines())
    found = list(zip(*lines, strict=True))
    return (found * -(-n // len(found)))[:n]


def _config(vocab_size: int, *, small: bool) -> TransformerConfig:
    """T5's rules, 4.7M parameters."""
    return TransformerConfig(
        family="encoder_decoder",
        dim=32 if small else 256,
        n_layers=1 if small else 2,
        n_heads=2 if small else 4,
        ffn_dim=64 if small else 1024,
        vocab_size=vocab_size,
        max_length=128,
        position="relative",
        norm="rms",
        norm_eps=1e-6,
        activation="relu",
        scale_attention=False,
        scale_logits=True,
        tie_embeddings=True,
        initialisation="t5",
    )


def laid_out(tokenizer: Tokenizer, texts: list[str], filler: int) -> Tensor:
    """Texts with their ends as rows of ids, [texts, the longest of them], filled up with `filler`."""
    ids = [torch.tensor([*tokenizer.encode(text), tokenizer.eot_id][:128]) for text in texts]
    return pad_sequence(ids, batch_first=True, padding_value=filler)


def _steps(pairs: list[tuple[str, str]], rows: int, tokenizer: Tokenizer) -> Iterator[list[dict[str, Tensor]]]:
    """One micro-batch each, as Seq2Seq wants it: targets begin with padding, labels end the text."""
    pad = tokenizer.pad_id
    for first in range(0, len(pairs), rows):
        sources, targets = (list(side) for side in zip(*pairs[first : first + rows], strict=True))
        source, labels = laid_out(tokenizer, sources, -1), laid_out(tokenizer, targets, IGNORED)
        read = labels.masked_fill(labels == IGNORED, pad).roll(1, dims=1)
        read[:, 0] = pad
        yield [
            {
                "source_tokens": source.clamp(min=0).where(source >= 0, pad),
                "source_documents": (source >= 0).long(),
                "source_positions": torch.arange(source.shape[1]).expand_as(source).contiguous(),
                "tokens": read,
                "labels": labels,
                "documents": (labels != IGNORED).long(),
                "positions": torch.arange(labels.shape[1]).expand_as(labels).contiguous(),
                "tasks": torch.zeros(len(labels), dtype=torch.long),
            }
        ]
