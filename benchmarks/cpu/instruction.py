"""A decoder on instructions with their answers: packed rows against padded ones.

As the encoder's measure, on next tokens of Code Alpaca's 2,017 instructions where they are at hand, else on texts whose
lengths are drawn (log-normal, a median of 40 words). The bar is nine tenths of the padding that is avoided.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from benchmarks.material import SHARED
from benchmarks.measure import Row, Session
from benchmarks.packing import packed_against_padded

ORDER = 4


def measure(session: Session) -> list[Row]:
    """The gain, and both speeds."""
    path = session.folder / "instructions.jsonl"
    found = session.data / "ins_codealpaca2k" / "train.jsonl.gz"
    texts = _given(found) if found.exists() and not session.smoke else _made(300 if session.smoke else 2000)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = [
        "model=tiny_decoder",
        "data=files",
        f"data.path={path}",
        f"tokenizer.vocab_size={300 if session.smoke else 4096}",
        "data.max_length=256",
        *SHARED,
    ]
    return packed_against_padded(session, run, rows=4 if session.smoke else 16, of_theory=0.9)


def _given(path: Path) -> list[str]:
    """Instruction, input if there is one, and answer, as Alpaca lays them out."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return ["\n\n".join(value for key in ("instruction", "input", "output") if (value := row.get(key))) for row in rows]


def _made(n: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=max(5, int(draw.lognormvariate(3.7, 0.7))))) for _ in range(n)]
