"""One process, one device."""

from __future__ import annotations

from typing import Literal

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy

from llm.model import TransformerConfig
from llm.strategy import attention, float8
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply, network_of, vocabulary_multiple
from llm.strategy.attention import AttentionKernel, Attentive, dtype_of
from llm.strategy.compiling import Compile, compile_loss, resolve
from llm.strategy.hooks import Hooked
from llm.strategy.stored import Stored


class Single(Hooked, Attentive, Stored, SingleDeviceStrategy):
    """One GPU or the CPU; checkpoints go through our store.

    Args:
        accelerator: the trainer's; "auto" has become one of the two by the time this is built.
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
        checkpointing: Checkpointing = "none",
        compile: Compile = "none",
        attention: AttentionKernel = "auto",
        float8: bool = False,
    ) -> None:
        super().__init__(device="cpu" if accelerator == "cpu" else "cuda:0")
        self.checkpointing = checkpointing
        self.compile = compile
        self.attention = attention
        self.float8 = float8

    def setup(self, trainer: L.Trainer) -> None:
        network = network_of(self.lightning_module)
        compile = resolve(self.compile, network, self.root_device)
        compiled = compile != "none"
        self.choose_attention(trainer, network, dtype_of(trainer.precision), n_data_processes=1, compiled=compiled)
        apply(
            network,
            float8=self.float8,
            checkpointing=self.checkpointing,
            compile=compile,
            vocabulary_multiple=vocabulary_multiple(self.root_device),
        )
        if compiled:
            compile_loss(self.lightning_module)
        super().setup(trainer)

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return 1

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        found = attention.problems(self.attention, model, accelerator, precision, documents=documents)
        found += float8.problems(model, accelerator) if self.float8 else []
        if world_size == 1:
            return found
        return [
            *found,
            f"strategy: single - drives one device, and trainer.devices x trainer.num_nodes is {world_size} - "
            f"take strategy=ddp or strategy=fsdp, or set both to 1",
        ]
