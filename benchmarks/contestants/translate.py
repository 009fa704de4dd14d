"""Greedy translations by a model of transformers, and how likely it finds those that people made.

`python -m benchmarks.contestants.translate MODEL BATCHES OUT`: a folder of transformers', a file of batches
(`input_ids`, `attention_mask`, `labels`), and where the rows of ids go that the model writes (`ids`) and the mean
cross-entropy of a label (`nats`), as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.utils.logging import disable_progress_bar

LONGEST = 80


def main(model: str, batches: str, out: str) -> None:
    """Translate; rows are as long as the longest of their batch."""
    disable_progress_bar()
    network = AutoModelForSeq2SeqLM.from_pretrained(model, attn_implementation="sdpa").eval()
    ids: list[list[int]] = []
    nats, n_labels = 0.0, 0
    for batch in torch.load(batches, weights_only=True):
        n = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            nats, n_labels = nats + n * network(**batch).loss.item(), n_labels + n
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids += network.generate(**source, do_sample=False, num_beams=1, max_new_tokens=LONGEST).tolist()
    Path(out).write_text(json.dumps({"ids": ids, "nats": nats / n_labels}))


if __name__ == "__main__":
    main(*sys.argv[1:])
