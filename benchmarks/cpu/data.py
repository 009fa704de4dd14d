"""Preparing, reading and opening data: `python -m benchmarks.cpu.data [prepare_rate …]`.

Each measure gives its figure, the bar and whether it is met; all go to benchmarks/results/data.json. The text is cut
out of the standard library at random places, in documents of some 3,000 characters. What needs a peak of memory of its
own runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
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

from llm.data import Files, NextToken, StandardLibrary
from llm.data.cache import META, Cache
from llm.data.collate import Settings
from llm.data.example import Symbols
from llm.data.order import Order
from llm.data.prepare import Held, Rows, prepare_rows, prepare_tokens
from llm.data.steps import TrainSteps
from llm.data.task import Widths
from llm.tokenizer import ByteLevelBPE, Tokenizer

RESULTS = Path(__file__).parents[1] / "results" / "data.json"
ROUNDS = 5
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


def prepare_rate(size: int = RATE_BYTES) -> Figures:
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
        for number in range(ROUNDS):
            theirs = _timed(lambda: [backend.encode_batch(texts[at : at + 1000]) for at in range(0, len(texts), 1000)])
            mine = _timed(partial(prepare_tokens, "text", source, ours, folder / str(number)))
            ratios.append(theirs / mine)
            speeds.append(size / 1e6 / mine)
        return _judged(
            "rate over encode_batch", _spread(ratios), ">=", 1.0, {"megabytes_per_s": round(median(speeds), 2)}
        )


def prepare_memory(size: int = MEMORY_BYTES) -> Figures:
    """Peak memory of a process that prepares tokens and rows of a file of `size` bytes, and of a quarter of it: what
    does not grow with the file will not for a larger one."""
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer().save(folder / "tokenizer")
        for n_bytes in (size // 4, size):
            write_text(folder / "text.jsonl", n_bytes)
            peaks[n_bytes] = _alone("_prepare", str(folder))["peak_mb"]
    quarter, whole = peaks.values()
    return _judged("peak memory, MB", whole, "<", 1000, {"bytes": size, "peak_mb_of_a_quarter": quarter})


def read_rate() -> Figures:
    """Tokens that are made into steps of 16,384 tokens by one core, a second of its time."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, ours = Path(scratch), tokenizer()
        write_text(folder / "text.jsonl", RATE_BYTES)
        tokens = prepare_tokens("text", Files(str(folder / "text.jsonl")), ours, folder)
        rates = {}
        for length in LENGTHS:
            rows = prepare_rows("text", tokens, Held(), (NextToken(), Widths(length, 0)), folder)
            steps = _steps(rows, ours)
            rates[length] = _spread([_tokens_per_s(steps, number) / 1e6 for number in range(ROUNDS)])
    worst = min(rates.values(), key=lambda rate: rate["median"])
    return _judged("million tokens a CPU second", worst, ">", 50, {"by_length": rates})


def open_index(n_tokens: int = INDEX_TOKENS) -> Figures:
    """From the finished caches of so many tokens, in documents of 1,000 and rows of 1,024, to the first step."""
    with tempfile.TemporaryDirectory() as scratch:
        _made_up(Path(scratch), n_tokens)
        told = _alone("_open", scratch)
    met = told["seconds"] < 1 and told["more_mb"] < 200
    return {"figure": "seconds, and MB more than before", **told, "bar": "< 1 s and < 200 MB", "met": met}


def _prepare(folder: str) -> Figures:
    root = Path(folder)
    cache = root / f"cache-{time.monotonic_ns()}"
    tokens = prepare_tokens("text", Files(str(root / "text.jsonl")), Tokenizer.load(root / "tokenizer"), cache)
    for held in (Held(20), Held(20, out=True)):
        prepare_rows("text", tokens, held, (NextToken(), Widths(256, 0)), cache)
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000}


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
    command = [sys.executable, "-m", "benchmarks.cpu.data", "--inside", name, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(told.stdout.splitlines()[-1])


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def _judged(figure: str, value: Any, sense: str, bar: float, more: Figures) -> Figures:
    of = value["median"] if isinstance(value, dict) else value
    met = {">=": of >= bar, ">": of > bar, "<": of < bar}[sense]
    return {"figure": figure, "value": value, "bar": f"{sense} {bar:g}", "met": met, **more}


MEASURES: dict[str, Callable[..., Figures]] = {
    "prepare_rate": prepare_rate,
    "prepare_memory": prepare_memory,
    "read_rate": read_rate,
    "open_index": open_index,
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(MEASURES)}; none: all")
    parser.add_argument("--size", type=int, help="bytes of the file of prepare_rate and prepare_memory")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        name, *arguments = options.name
        print(json.dumps({"_prepare": _prepare, "_open": _open}[name](*arguments)))
        return
    kept: Figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.name or MEASURES:
        sized = options.size is not None and name in ("prepare_rate", "prepare_memory")
        kept[name] = MEASURES[name](options.size) if sized else MEASURES[name]()
        print(name, json.dumps(kept[name]), flush=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
