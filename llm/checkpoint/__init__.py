"""From a run to disk and back."""

from llm.checkpoint.distribute import gather, load_whole, load_whole_optimizer, place
from llm.checkpoint.load import load, load_into
from llm.checkpoint.store import CheckpointError, find, newest, read, step_name, steps, write

__all__ = [
    "CheckpointError",
    "find",
    "gather",
    "load",
    "load_into",
    "load_whole",
    "load_whole_optimizer",
    "newest",
    "place",
    "read",
    "step_name",
    "steps",
    "write",
]
