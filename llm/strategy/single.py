"""One process, one device."""

from __future__ import annotations

from typing import Literal

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy

from llm.model import TransformerConfig
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply, network_of
from llm.strategy.hooks import Hooked
from llm.strategy.stored import Stored


class Single(Hooked, Stored, SingleDeviceStrategy):
    """One GPU or the CPU; checkpoints go through our store.

    Args:
        accelerator: the trainer's; "auto" has become one of the two by the time this is built.
        checkpointing: what of a block's forward is computed again in the backward: none, full (everything) or
            selective (all but matrix products and attention).
        compile: compile each block with torch.compile.
    """

    def __init__(
        self,
        accelerator: Literal["auto", "cpu", "gpu", "cuda"],
        checkpointing: Checkpointing = "none",
        compile: bool = False,
    ) -> None:
        super().__init__(device="cpu" if accelerator == "cpu" else "cuda:0")
        self.checkpointing = checkpointing
        self.compile = compile

    def setup(self, trainer: L.Trainer) -> None:
        apply(network_of(self.lightning_module), checkpointing=self.checkpointing, compile=self.compile)
        super().setup(trainer)

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return 1

    def problems(self, model: TransformerConfig, world_size: int) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        if world_size == 1:
            return []
        return [
            f"strategy: single - drives one device, and trainer.devices x trainer.num_nodes is {world_size} - "
            f"take strategy=ddp or strategy=fsdp, or set both to 1"
        ]
