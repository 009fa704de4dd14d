"""From a run to disk and back."""

from llm.checkpoint.load import load, load_into
from llm.checkpoint.store import CheckpointError, newest, read, step_name, write

__all__ = ["CheckpointError", "load", "load_into", "newest", "read", "step_name", "write"]
