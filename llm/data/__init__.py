"""From raw text to batches: see docs/architecture.md, "The way of a batch"."""

from importlib import import_module
from typing import Any

from llm.data.source import DataError, Files, Hub, Source, StandardLibrary
from llm.data.task import FillInTheMiddle, Masking, NextToken, SpanDenoising, Task

# These load torch or lightning, which a config mistake must not wait for.
_HOMES = {
    "Step": "llm.data.collate",
    "TextData": "llm.data.module",
}

__all__ = [
    "DataError",
    "Files",
    "FillInTheMiddle",
    "Hub",
    "Masking",
    "NextToken",
    "Source",
    "SpanDenoising",
    "StandardLibrary",
    "Task",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
