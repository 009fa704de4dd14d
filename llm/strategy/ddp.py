"""Every process has the whole model and its share of the batch."""

from __future__ import annotations

from typing import Annotated

import lightning as L
import torch
from annotated_types import Gt
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from llm.launch import place
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.attention import AttentionKernel
from llm.strategy.compiling import Compile
from llm.strategy.hooks import Hooked
from llm.strategy.process_group import join_process_group, seed_dropout
from llm.strategy.stored import Stored
from llm.strategy.whole import Whole


class DDP(Hooked, Whole, Stored, DDPStrategy):
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
        self.prepare_network(trainer, n_data_processes=self.n_data_processes(self.world_size))
        super().setup(trainer)
        if isinstance(self.model, DistributedDataParallel):
            settle_buckets(self.model)
        seed_dropout(self.global_rank)

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return world_size


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Have torch lay its buckets out anew before the first step, by a backward of zeros through all parameters.

    It does that once, after the first backward that it sees, in the order in which gradients came. Where a gradient
    lies decides in which order an all-reduce among three or more adds it up, so that the first step of a run that goes
    on would differ in the last bit from the same step of one that was never stopped. Of these zeros the last
    parameter's come first, as they nearly do in a real backward.
    """
    trained = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    nothing = torch.stack([0 * parameter.flatten()[0].float() for parameter in trained]).sum()
    ddp.reducer.prepare_for_forward()
    ddp.reducer.prepare_for_backward([])
    nothing.backward()
    if not ddp.reducer._rebuild_buckets():
        raise RuntimeError("torch has not laid out its buckets anew: this is not the release that this was written for")
    ddp.zero_grad(set_to_none=False)
