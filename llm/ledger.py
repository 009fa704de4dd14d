"""`RUN/ledger.jsonl`: what each step consumed, appended as it happens, every line sealed with the one before.

Lines are steps (`step`, `batch`, `samples`, `loss`, and `skipped` with the cause where no update was made) and events
(`event`: start, resume or rollback, which says what is `left_out` and why). Nothing is ever changed: a run that goes on
from step N writes an event that says so, and what had come after N counts no more. `chain` is the hash of the line and
of the chain before it, so one altered, lost or added line is found.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "ledger.jsonl"
_START = "0" * 16
Line = dict[str, Any]


class Ledger:
    """The ledger of a run, open for writing."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / NAME
        self.chain = _START

    def open(self) -> None:
        """Go on behind the last whole line; half a line, which a crash leaves, was never written."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)
        if whole:
            last = content[:whole].rstrip(b"\n").rpartition(b"\n")[2]
            self.chain = json.loads(last)["chain"]

    def append(self, lines: Sequence[Line], *, sync: bool = False) -> None:
        """Add lines, without their chain; with `sync` they survive a power loss."""
        text = ""
        for line in lines:
            sorted_line = json.dumps(line, sort_keys=True)
            self.chain = _seal(self.chain, sorted_line)
            text += f'{sorted_line[:-1]}, "chain": "{self.chain}"}}\n'
        with open(self.path, "a") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def chained(before: str, line: Line) -> str:
    """The chain after a line."""
    return _seal(before, json.dumps(line, sort_keys=True))


def _seal(before: str, sorted_line: str) -> str:
    return hashlib.sha256(f"{before} {sorted_line}".encode()).hexdigest()[:16]


def packed(samples: Sequence[int]) -> str:
    """Ids in as few characters as their size allows: bytes for each, a colon, and all of them in base64."""
    width = max(1, (max(samples, default=0).bit_length() + 7) // 8)
    raw = b"".join(sample.to_bytes(width, "little") for sample in samples)
    return f"{width}:{base64.b64encode(raw).decode()}"


def unpacked(text: str) -> list[int]:
    """The other half of `packed`."""
    width, _, encoded = text.partition(":")
    raw, size = base64.b64decode(encoded), int(width)
    return [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)]


@dataclass
class Account:
    """What a ledger comes to.

    steps     what counts in the end, by step: lines with `samples` as lists
    events    starts, resumes and rollbacks, in the order in which they were written
    n_undone  steps that were done again after an interruption
    mistakes  one line for each way in which the ledger contradicts itself
    """

    steps: dict[int, Line] = field(default_factory=dict)
    events: list[Line] = field(default_factory=list)
    n_undone: int = 0
    mistakes: list[str] = field(default_factory=list)
    chains: dict[str, int] = field(default_factory=dict)  # the number of the line that each seals

    @property
    def rows(self) -> dict[str, int]:
        """How many each source has, by the first start; none where no start is left."""
        return self.events[0]["rows"] if self.events else {}


def read(run_dir: str | Path) -> Account:
    """Read and check a ledger: every seal, every step after the one before, every sample once in each pass.

    Raises:
        FileNotFoundError: if there is none.
    """
    account = Account()
    for number, line, fault in _lines(Path(run_dir) / NAME):
        if fault is not None:
            account.mistakes.append(f"line {number}: {fault}")
        if line is None:
            continue
        account.chains[line.pop("chain")] = number
        if not _is_written(line):
            account.mistakes.append(f"line {number}: holds what no ledger is given")
        elif "event" in line:
            undone = [step for step in account.steps if step > line["step"]]
            account.n_undone += len(undone)
            for step in undone:
                del account.steps[step]
            account.events.append(line)
            if line["step"] != max(account.steps, default=0):
                account.mistakes.append(f"line {number}: {line['event']}s at step {line['step']}, which is not here")
        else:
            last = max(account.steps, default=0)
            if line["step"] != last + 1:
                account.mistakes.append(f"line {number}: step {line['step']}, where {last + 1} was due")
            elif last and line["batch"] != account.steps[last]["batch"] + 1:
                account.mistakes.append(
                    f"line {number}: batch {line['batch']} after batch {account.steps[last]['batch']}"
                )
            account.steps[line["step"]] = line | {"samples": unpacked(line["samples"])}
    return account


def _lines(path: Path) -> Iterator[tuple[int, Line | None, str | None]]:
    """Number, line and what is wrong with it."""
    chain = _START
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return  # being written, or cut by a crash
            try:
                line: Line = json.loads(raw)
                found = line["chain"]
                bare = {key: value for key, value in line.items() if key != "chain"}
                hash(found)  # by which it is kept
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield number, None, "is no line of a ledger"
                continue
            expected = chained(chain, bare)
            yield number, line, None if found == expected else "was altered, or a line before it is lost or added"
            chain = found


_STEP = {"step": int, "batch": int, "samples": str}
_EVENT = {"step": int, "event": str, "world_size": int, "data": str, "rows": dict}
_ROLLBACK = {"cause": str, "found": int, "left_out": list}


def _is_written(line: Line) -> bool:
    """Whether a line holds what `append` is given: one that was altered may hold anything."""
    wanted: dict[str, type] = _EVENT if "event" in line else _STEP
    wanted = wanted | (_ROLLBACK if line.get("event") == "rollback" else {})
    if any(type(line.get(key)) is not kind for key, kind in wanted.items()):
        return False
    if "event" in line:
        counts = all(type(n) is int and n > 0 for n in line["rows"].values())
        return counts and isinstance(line.get("after"), str | None) and len(line.get("left_out", "ab")) == 2
    try:
        unpacked(line["samples"])
        float.fromhex("nan" if line["loss"] is None else line["loss"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return False
    return True


def passes(account: Account) -> list[str]:
    """Samples that a pass over their source gave twice or not at all: one line for each source where that is so.

    Each source's samples come in passes, in each of which every one of its rows is there once. Sources number their
    rows one after the other.
    """
    if not account.events:
        return ["there is no start"]
    mistakes, first = [], 0
    drawn = [sample for step in sorted(account.steps) for sample in account.steps[step]["samples"]]
    for name, n_rows in account.rows.items():
        mine = [sample for sample in drawn if first <= sample < first + n_rows]
        for number, at in enumerate(range(0, len(mine), n_rows)):
            one = mine[at : at + n_rows]
            twice = sorted(sample for sample, times in _counts(one).items() if times > 1)
            if twice:
                mistakes.append(f"{name}: pass {number + 1} has row {twice[0] - first} twice ({len(twice)} such rows)")
        first += n_rows
    strange = [sample for sample in drawn if not 0 <= sample < first]
    return mistakes + ([f"sample {strange[0]} is of no source"] if strange else [])


def _counts(samples: list[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for sample in samples:
        counts[sample] = counts.get(sample, 0) + 1
    return counts
