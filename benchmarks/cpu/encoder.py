"""Masked language modelling on documents of varying length: packed rows against padded ones.

Both are train.py with the same model on the same documents with the same tokens hidden, so the losses agree: packed as
the project's data does it (read, hidden and packed as the run goes on), and padded to the longest document of the step
(prepared, in memory). Real tokens per CPU-second; the bar is the padding that is avoided. Rows are as long as BERT's.
"""

from __future__ import annotations

from benchmarks.material import SHARED, text_file
from benchmarks.measure import Row, Session
from benchmarks.packing import packed_against_padded

ORDER = 3


def measure(session: Session) -> list[Row]:
    """The gain, and both speeds."""
    text = text_file(session.folder, 60_000 if session.smoke else 2_000_000)
    run = [
        "model=tiny_encoder",
        "objective=masked_lm",
        "data/tasks=masked_lm",
        "data=text",
        f"data.sources.text.path={text}",
        "tokenizer=wordpiece",
        f"tokenizer.vocab_size={300 if session.smoke else 4096}",
        "data.max_length=512",
        *SHARED,
    ]
    return packed_against_padded(session, run, rows=4)
