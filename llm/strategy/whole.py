"""What strategies share under which every process has the whole network."""

from __future__ import annotations

from typing import Literal

import lightning as L

from llm.model import Transformer, TransformerConfig
from llm.strategy import attention, float8
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply, network_of, vocabulary_multiple
from llm.strategy.attention import Attentive, dtype_of
from llm.strategy.compiling import Compile, quicken_loss, resolve


class Whole(Attentive):
    """Before `Stored` in the order of base classes, as `Attentive` is."""

    checkpointing: Checkpointing
    compile: Compile
    float8: bool
    lightning_module: L.LightningModule | None

    def prepare_network(self, trainer: L.Trainer, n_data_processes: int) -> None:
        """Choose the kernel of attention, then change and compile the network; before the optimizer is built."""
        network = network_of(self.lightning_module)
        compile = resolve(self.compile, network, self.root_device)
        compiled = compile != "none"
        self.choose_attention(trainer, network, dtype_of(trainer.precision), n_data_processes, compiled=compiled)
        self.place(network, compile, vocabulary_multiple(self.root_device))
        quicken_loss(self.lightning_module, self.root_device, compiled=compiled)

    def place(
        self, network: Transformer, compile: Literal["none", "blocks", "whole"], vocabulary_multiple: int
    ) -> None:
        """Change and compile a network."""
        apply(
            network,
            float8=self.float8,
            checkpointing=self.checkpointing,
            compile=compile,
            vocabulary_multiple=vocabulary_multiple,
        )

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        found = attention.problems(self.attention, model, accelerator, precision, documents=documents)
        return found + (float8.problems(model, accelerator) if self.float8 else [])
