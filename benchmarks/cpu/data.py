"""Preparing, reading and opening data.

The text is cut out of the standard library at random places, in documents of some 3,000 characters. What needs a peak
of memory of its own runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from benchmarks.contest import Spread
from benchmarks.measure import Bar, Row, Session
from llm.data import Files, NextToken, StandardLibrary
from llm.data.cache import META, Cache
from llm.data.collate import Settings
from llm.data.example import Symbols
from llm.data.order import Order
from llm.data.prepare import Held, Rows, prepare_rows, prepare_tokens
from llm.data.steps import TrainSteps
from llm.data.task import Widths
from llm.tokenizer import ByteLevelBPE, Tokenizer

RATE_BYTES = 20_000_000
MEMORY_BYTES = 1_000_000_000
LENGTHS = (64, 256, 1024)
TOKENS_PER_STEP = 16_384
INDEX_TOKENS = 10_000_000_000
Figures = dict[str, Any]


def write_text(path: Path, n_bytes: int) -> None:
    """About so many bytes of documents, as JSON lines."""
    text, rng = "\n".join(StandardLibrary().documents()), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        left = n_bytes
        while left > 0:
            size = min(int(rng.lognormvariate(7.5, 1.0)) + 1, left, len(text) // 2)
            at = rng.randrange(len(text) - size)
            left -= file.write(json.dumps({"text": text[at : at + size]}) + "\n")


def tokenizer() -> Tokenizer:
    """Of the default run, trained on every tenth file."""
    return ByteLevelBPE(4096).build([text for i, text in enumerate(StandardLibrary().documents()) if i % 10 == 0])


def measure(session: Session) -> list[Row]:
    """Rates, then memory."""
    small = 20 if session.smoke else 1
    return [
        prepare_rate(RATE_BYTES // small, session.rounds),
        *(read_rate(length, RATE_BYTES // small, session.rounds) for length in LENGTHS),
        *prepare_memory(MEMORY_BYTES // small**2),
        *open_index(INDEX_TOKENS // small),
    ]


def prepare_rate(size: int, n_rounds: int) -> Row:
    """File to token file over the library's own encode_batch of the same texts, which lie in memory: wall time, on all
    cores, round by round."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, ours = Path(scratch), tokenizer()
        write_text(folder / "text.jsonl", size)
        source = Files(str(folder / "text.jsonl"))
        texts = list(source.documents())
        backend = Backend.from_str(ours.backend.to_str())
        ours.encode("warm"), backend.encode_batch(texts[:10])
        ratios, speeds = [], []
        for number in range(n_rounds):
            theirs = _timed(lambda: [backend.encode_batch(texts[at : at + 1000]) for at in range(0, len(texts), 1000)])
            mine = _timed(partial(prepare_tokens, "text", source, ours, folder / str(number)))
            ratios.append(theirs / mine)
            speeds.append(size / 1e6 / mine)
        note = f"{median(speeds):.1f} MB/s"
        return Row("preparing over encode_batch", "x", Spread.of(ratios), Bar(">=", 1.0), note=note)


def prepare_memory(size: int) -> list[Row]:
    """Peak memory of a process that prepares tokens and rows of a file of `size` bytes, and of a quarter of it: what
    does not grow with the file will not for a larger one."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer().save(folder / "tokenizer")
        for n_bytes in (size // 4, size):
            write_text(folder / "text.jsonl", n_bytes)
            peak = Spread.of([_alone("_prepare", str(folder))["peak_mb"]])
            rows.append(Row(f"preparing {n_bytes / 1e6:,.0f} MB, peak memory", "MB", peak, Bar("<=", 1000)))
    return rows


def read_rate(length: int, size: int, n_rounds: int) -> Row:
    """Tokens that are made into steps of 16,384 tokens by one core, a second of its time, in rows of `length`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, ours = Path(scratch), tokenizer()
        write_text(folder / "text.jsonl", size)
        tokens = prepare_tokens("text", Files(str(folder / "text.jsonl")), ours, folder)
        steps = _steps(prepare_rows("text", tokens, Held(), (NextToken(), Widths(length, 0)), folder), ours)
        rates = Spread.of([_tokens_per_s(steps, number) / 1e6 for number in range(n_rounds)])
    return Row(f"reading rows of {length:,}", "M tokens/CPU-s", rates, Bar(">=", 50))


def open_index(n_tokens: int) -> list[Row]:
    """From the finished caches of so many tokens, in documents of 1,000 and rows of 1,024, to the first step."""
    with tempfile.TemporaryDirectory() as scratch:
        _made_up(Path(scratch), n_tokens)
        told = _alone("_open", scratch)
    case = f"opening {n_tokens / 1e9:g} billion tokens"
    return [
        Row(case, "s", Spread.of([told["seconds"]]), Bar("<=", 1.0)),
        Row(f"{case}, memory", "MB", Spread.of([told["more_mb"]]), Bar("<=", 200)),
    ]


def _prepare(folder: str) -> Figures:
    root = Path(folder)
    cache = root / f"cache-{time.monotonic_ns()}"
    tokens = prepare_tokens("text", Files(str(root / "text.jsonl")), Tokenizer.load(root / "tokenizer"), cache)
    for held in (Held(20), Held(20, out=True)):
        prepare_rows("text", tokens, held, (NextToken(), Widths(256, 0)), cache)
    return {"peak_mb": _peak_mb()}


def _made_up(folder: Path, n_tokens: int) -> None:
    """Caches as preparation leaves them, with tokens that are all 0 and take no room on the disk."""
    tokens, rows = folder / "tokens-0000000000000000", folder / "rows-0000000000000000"
    tokens.mkdir()
    rows.mkdir()
    with (tokens / "tokens.bin").open("wb") as file:
        file.truncate(2 * n_tokens)
    np.arange(0, n_tokens + 1, 1000, dtype=np.int64).tofile(tokens / "documents.bin")
    (tokens / "words.bin").touch()
    n_rows = n_tokens // 1024
    np.arange(0, n_rows * 1024, 1024, dtype=np.int64).tofile(rows / "starts.bin")
    np.full(n_rows, 1024, np.int32).tofile(rows / "lengths.bin")
    np.arange(1, n_rows + 1, dtype=np.int64).tofile(rows / "ends.bin")
    shared: Figures = {"source": "text", "documents": n_tokens // 1000}
    of_tokens = {"dtype": "uint16", "words": False, "content": "", "tokens": n_tokens, "bytes": 4 * n_tokens}
    of_rows = {"rows": n_rows, "inputs": n_rows * 1024, "cut": 0, "pairs": 0, "fill": 1.0, "held": {}}
    for cache, meta in ((tokens, of_tokens), (rows, of_rows)):
        files = {file.name: file.stat().st_size for file in cache.iterdir()}
        (cache / META).write_text(json.dumps({**shared, **meta, "files": files}))


def _open(folder: str) -> Figures:
    ours = tokenizer()
    before, start = _resident_mb(), time.perf_counter()
    tokens, rows = (_found(Path(folder) / f"{kind}-0000000000000000") for kind in ("tokens", "rows"))
    steps = _steps(Rows(tokens, rows, NextToken(), Widths(1024, 0)), ours)
    assert steps[0].micro_batches
    return {"seconds": round(time.perf_counter() - start, 3), "more_mb": round(_resident_mb() - before, 1)}


def _found(path: Path) -> Cache:
    return Cache(path, json.loads((path / META).read_text()))


def _steps(rows: Rows, ours: Tokenizer) -> TrainSteps:
    batch = max(1, TOKENS_PER_STEP // rows.widths.row)
    order = Order((len(rows),), (1.0,), batch, seed=0)
    settings = Settings(Symbols.of(ours), document_mask=True, seed=0)
    return TrainSteps([rows], np.zeros(1, np.int64), (0, 1, None), settings, order)


def _tokens_per_s(steps: TrainSteps, number: int, n_steps: int = 200) -> float:
    seen, start = 0, time.process_time()
    for index in range(number * n_steps, (number + 1) * n_steps):
        seen += sum(batch["tokens"].numel() for batch in steps[index].micro_batches)
    return seen / (time.process_time() - start)


def _alone(name: str, *arguments: str) -> Figures:
    """What a function of this file gives in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.data", name, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(told.stdout.splitlines()[-1])


def _peak_mb() -> float:
    """Of this program; what getrusage tells is also that of the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":  # a process that `_alone` started
    print(json.dumps({"_prepare": _prepare, "_open": _open}[sys.argv[1]](*sys.argv[2:])))
