"""One process, one device."""

from __future__ import annotations

from typing import Literal

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy

from llm.model import TransformerConfig
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.attention import AttentionKernel
from llm.strategy.compiling import Compile
from llm.strategy.hooks import Hooked
from llm.strategy.stored import Stored
from llm.strategy.whole import Whole


class Single(Hooked, Whole, Stored, SingleDeviceStrategy):
    """One GPU or the CPU; checkpoints go through our store.

    Args:
        accelerator: the trainer's; "auto" has become one of the two by the time this is built.
        devices: the trainer's, of which a list names the GPU to take.
        checkpointing: what of a block's forward is computed again in the backward: none, full (everything) or
            selective (all but matrix products and attention).
        compile: with torch.compile each block, or the whole network, and the loss; auto: see llm.strategy.compiling.
        attention: the kernel that computes it, where it can serve; auto: the fastest, tried at the start, on a CPU
            torch's choice.
        float8: multiply the matrices of the blocks in 8-bit floating point.
    """

    def __init__(
        self,
        accelerator: Literal["auto", "cpu", "gpu", "cuda"],
        devices: int | str | list[int] = "auto",
        checkpointing: Checkpointing = "none",
        compile: Compile = "none",
        attention: AttentionKernel = "auto",
        float8: bool = False,
    ) -> None:
        number = devices[0] if isinstance(devices, list) else 0
        super().__init__(device="cpu" if accelerator == "cpu" else f"cuda:{number}")
        self.checkpointing = checkpointing
        self.compile = compile
        self.attention = attention
        self.float8 = float8

    def setup(self, trainer: L.Trainer) -> None:
        self.prepare_network(trainer, n_data_processes=1)
        super().setup(trainer)

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return 1

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        found = super().problems(model, world_size, accelerator, precision, documents)
        if world_size == 1:
            return found
        return [
            *found,
            f"strategy: single - drives one device, and trainer.devices x trainer.num_nodes is {world_size} - "
            f"take strategy=ddp or strategy=fsdp, or set both to 1",
        ]
