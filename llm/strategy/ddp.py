"""Every process has the whole model and its share of the batch."""

from __future__ import annotations

from typing import Annotated

import lightning as L
from annotated_types import Gt
from lightning.pytorch.strategies import DDPStrategy

from llm.launch import place
from llm.model import TransformerConfig
from llm.strategy import attention, float8
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply, network_of, vocabulary_multiple
from llm.strategy.attention import AttentionKernel, Attentive, dtype_of
from llm.strategy.compiling import Compile, compile_loss, resolve
from llm.strategy.hooks import Hooked
from llm.strategy.process_group import join_process_group, seed_dropout
from llm.strategy.stored import Stored


class DDP(Hooked, Attentive, Stored, DDPStrategy):
    """Distributed data parallel (Li et al. 2020, arXiv:2006.15704): gradients are averaged, once a step.

    Args:
        timeout_s: after which a collective that some rank does not join ends the run.
        checkpointing: what of a block's forward is computed again in the backward: none, full (everything) or
            selective (all but matrix products and attention).
        compile: with torch.compile each block, or the whole network, and the loss; auto: see llm.strategy.compiling.
        attention: the kernel that computes it, where it can serve; auto: the fastest, tried at the start, on a CPU
            torch's choice.
        float8: multiply the matrices of the blocks in 8-bit floating point.
    """

    # Views into what is sent: set to None they would be made anew beside it, between micro-batches.
    keeps_gradients = True

    def __init__(
        self,
        timeout_s: Annotated[float, Gt(0)] = 600,
        checkpointing: Checkpointing = "none",
        compile: Compile = "none",
        attention: AttentionKernel = "auto",
        float8: bool = False,
    ) -> None:
        # The gradients are views into what is sent, so there is one copy of them and not two.
        super().__init__(gradient_as_bucket_view=True)
        self.timeout_s = timeout_s
        self.checkpointing = checkpointing
        self.compile = compile
        self.attention = attention
        self.float8 = float8

    def _configure_launcher(self) -> None:
        """Processes are started by llm.launch, torchrun or srun."""

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        join_process_group(place(), self.root_device, self.timeout_s)

    def setup(self, trainer: L.Trainer) -> None:
        network = network_of(self.lightning_module)
        compile = resolve(self.compile, network, self.root_device)
        n_data = self.n_data_processes(self.world_size)
        compiled = compile != "none"
        self.choose_attention(trainer, network, dtype_of(trainer.precision), n_data, compiled=compiled)
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
        seed_dropout(self.global_rank)

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return world_size

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        found = attention.problems(self.attention, model, accelerator, precision, documents=documents)
        return found + (float8.problems(model, accelerator) if self.float8 else [])
