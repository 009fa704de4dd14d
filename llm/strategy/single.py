"""One process, one device."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.strategies import SingleDeviceStrategy

from llm.strategy.checkpoint_io import DirectoryIO


class Single(SingleDeviceStrategy):
    """One GPU or the CPU; checkpoints go through our store.

    Args:
        accelerator: the trainer's; "auto" has become one of the two by the time this is built.
    """

    def __init__(self, accelerator: Literal["auto", "cpu", "gpu", "cuda"]) -> None:
        super().__init__(device="cpu" if accelerator == "cpu" else "cuda:0", checkpoint_io=DirectoryIO())
