"""From a run to disk and back."""

from llm.checkpoint.distribute import gather, load_whole, load_whole_optimizer, place
from llm.checkpoint.exchange import export_folder, import_folder
from llm.checkpoint.load import configuration_at, disagreements, load, load_into, tokenizer_at, weights_at
from llm.checkpoint.store import CheckpointError, find, newest, read, step_name, steps, write

__all__ = [
    "CheckpointError",
    "configuration_at",
    "disagreements",
    "export_folder",
    "find",
    "gather",
    "import_folder",
    "load",
    "load_into",
    "load_whole",
    "load_whole_optimizer",
    "newest",
    "place",
    "read",
    "step_name",
    "steps",
    "tokenizer_at",
    "weights_at",
    "write",
]
