"""Lightning's checkpoint calls, answered by our store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from llm.checkpoint import read, write


class DirectoryIO(CheckpointIO):
    """Checkpoints as directories that are whole or absent.

    `attachments` are copied into each: the run sets them to its resolved config and its tokenizer.
    """

    def __init__(self) -> None:
        self.attachments: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` as the directory `path`."""
        write(Path(path), checkpoint, self.attachments)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The state in the directory `path`; tensors and plain data only, whatever the caller would allow."""
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the directory `path`, which retention no longer wants."""
        shutil.rmtree(path, ignore_errors=True)
