"""Greedy translations by a model of transformers.

`python -m benchmarks.contestants.translate MODEL SOURCES OUT`: a folder of transformers', a file of batches
(`input_ids`, `attention_mask`), and where the rows of ids go that the model writes, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.utils.logging import disable_progress_bar

LONGEST = 80


def main(model: str, sources: str, out: str) -> None:
    """Translate; rows are as long as the longest of their batch."""
    disable_progress_bar()
    network = AutoModelForSeq2SeqLM.from_pretrained(model, attn_implementation="sdpa").eval()
    written: list[list[int]] = []
    for batch in torch.load(sources, weights_only=True):
        written += network.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=LONGEST).tolist()
    Path(out).write_text(json.dumps(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
