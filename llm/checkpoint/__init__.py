"""From a run to disk and back."""

from llm.checkpoint.adapter import put_on, write_peft
from llm.checkpoint.average import average
from llm.checkpoint.distribute import load_whole, place, weights_of
from llm.checkpoint.exchange import export_folder, import_folder
from llm.checkpoint.labels import labels_of
from llm.checkpoint.load import (
    configuration_at,
    disagreements,
    load,
    load_into,
    starting_anew,
    tokenizer_at,
    weights_at,
)
from llm.checkpoint.shards import index as stored_tensors
from llm.checkpoint.shards import load_into as load_tensors
from llm.checkpoint.store import (
    CheckpointError,
    find,
    newest,
    newest_verified,
    oldest_verified,
    read_state,
    read_tensors,
    remove,
    remove_after,
    save,
    set_aside_damaged,
    step_name,
    steps,
    sweep,
)

__all__ = [
    "CheckpointError",
    "average",
    "configuration_at",
    "disagreements",
    "export_folder",
    "find",
    "import_folder",
    "labels_of",
    "load",
    "load_into",
    "load_tensors",
    "load_whole",
    "newest",
    "newest_verified",
    "oldest_verified",
    "place",
    "put_on",
    "read_state",
    "read_tensors",
    "remove",
    "remove_after",
    "save",
    "set_aside_damaged",
    "starting_anew",
    "step_name",
    "steps",
    "stored_tensors",
    "sweep",
    "tokenizer_at",
    "weights_at",
    "weights_of",
    "write_peft",
]
