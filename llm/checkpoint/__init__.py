"""From a run to disk and back."""

from llm.checkpoint.load import load, load_into
from llm.checkpoint.store import CheckpointError, find, newest, read, step_name, steps, write

__all__ = ["CheckpointError", "find", "load", "load_into", "newest", "read", "step_name", "steps", "write"]
