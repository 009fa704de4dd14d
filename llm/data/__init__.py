"""From raw text to batches: see docs/architecture.md, "The way of a batch"."""

from importlib import import_module
from typing import Any

from llm.data.labelling import Classify, ExtractSpan, Tag
from llm.data.likelihood import Choose, Cloze, Perplexity
from llm.data.source import DataError, Files, Hub, Lines, Source, StandardLibrary
from llm.data.supervised import Supervised
from llm.data.task import FillInTheMiddle, Masking, NextToken, SpanDenoising, Task
from llm.data.writing import Dialogue, Preference, Prompted, TextToText, WriteCode

# These load torch or lightning, which a config mistake must not wait for.
_HOMES = {
    "Step": "llm.data.collate",
    "TextData": "llm.data.module",
}

__all__ = [
    "Choose",
    "Classify",
    "Cloze",
    "DataError",
    "Dialogue",
    "ExtractSpan",
    "Files",
    "FillInTheMiddle",
    "Hub",
    "Lines",
    "Masking",
    "NextToken",
    "Perplexity",
    "Preference",
    "Prompted",
    "Source",
    "SpanDenoising",
    "StandardLibrary",
    "Supervised",
    "Tag",
    "Task",
    "TextToText",
    "WriteCode",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
