"""Parameters, gradients and optimizer state spread over processes, and blocks split among them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import partial
from typing import Annotated, Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from annotated_types import Gt
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llm import reduce
from llm.launch import place
from llm.model import Transformer, TransformerConfig
from llm.strategy import attention, float8, tensor_parallel
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply, network_of, vocabulary_multiple
from llm.strategy.attention import AttentionKernel, Attentive, dtype_of
from llm.strategy.compiling import quicken_loss, resolve
from llm.strategy.hooks import Hooked
from llm.strategy.materialise import materialise
from llm.strategy.process_group import join_process_group, seed_dropout, set_timeout
from llm.strategy.stored import Stored

_AXES = ("replicate", "shard", "tensor")


class FSDP(Hooked, Attentive, Stored, ModelParallelStrategy):
    """Fully sharded data parallel (Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277) by
    torch's fully_shard, with replicas of the shards (HSDP) and tensor parallelism as further axes of the mesh.

    The processes form a mesh [replicate, shard, tensor], neighbours sharing a block: what is sent most is sent nearest.
    Under trainer.precision=bf16-true blocks compute in bfloat16 while the sharded weights, the optimizer and the sums
    of gradients stay float32. The network is built on the meta device and drawn shard by shard, with the same numbers
    as in one process.

    Args:
        replicate_size: groups of processes that each hold the whole model; 1 spreads it over all.
        tensor_parallel_size: processes that share each block's matrix products and the same data.
        reshard_after_forward: free a block's parameters after its forward and gather them again for its backward; false
            keeps them, which sends a third less and holds the whole model.
        timeout_s: after which a collective that some rank does not join ends the run.
        checkpointing: what of a block's forward is computed again in the backward: none, full (everything) or
            selective (all but matrix products and attention).
        compile: with torch.compile each block and the loss; auto: not on a CPU. The network as a whole cannot be
            traced, as blocks are gathered in between.
        attention: the kernel that computes it, where it can serve; auto: the fastest, tried at the start, on a CPU
            torch's choice.
        float8: multiply the matrices of the blocks in 8-bit floating point.
    """

    def __init__(
        self,
        replicate_size: Annotated[int, Gt(0)] = 1,
        tensor_parallel_size: Annotated[int, Gt(0)] = 1,
        reshard_after_forward: bool = True,
        timeout_s: Annotated[float, Gt(0)] = 600,
        checkpointing: Checkpointing = "none",
        compile: Literal["none", "blocks", "auto"] = "none",
        attention: AttentionKernel = "auto",
        float8: bool = False,
    ) -> None:
        super().__init__()
        self.replicate_size = replicate_size
        self.tensor_parallel_size = tensor_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.timeout_s = timeout_s
        self.checkpointing = checkpointing
        self.compile = compile
        self.attention = attention
        self.float8 = float8
        self._policy = MixedPrecisionPolicy()

    def n_data_processes(self, world_size: int) -> int:
        """How many processes have data of their own."""
        return max(1, world_size // self.tensor_parallel_size)

    def problems(
        self, model: TransformerConfig, world_size: int, accelerator: str, precision: str, documents: bool
    ) -> list[str]:
        """One line for each reason why `world_size` processes cannot train `model`."""
        unit = self.replicate_size * self.tensor_parallel_size
        found = tensor_parallel.problems(model, self.tensor_parallel_size)
        if not found:  # else there are no such heads
            n_shares = self.tensor_parallel_size
            found += attention.problems(self.attention, model, accelerator, precision, n_shares, documents=documents)
        found += float8.problems(model, accelerator, self.tensor_parallel_size) if self.float8 else []
        if world_size % unit:
            found.append(
                f"strategy.replicate_size x strategy.tensor_parallel_size: {self.replicate_size} x "
                f"{self.tensor_parallel_size} - must divide the {world_size} processes of the run - "
                f"change them, or trainer.devices and trainer.num_nodes"
            )
        return found

    # Processes

    def _configure_launcher(self) -> None:
        """Processes are started by llm.launch, torchrun or srun."""

    def setup_environment(self) -> None:
        """Join the process group, lay the processes out as a mesh, and take over the precision."""
        Strategy.setup_environment(self)
        self.set_world_ranks()
        join_process_group(place(), self.root_device, self.timeout_s)
        self.lay_out(self.root_device.type, self.world_size, str(self.precision_plugin.precision))
        data_group = self._data_group()
        for group in [*self.device_mesh.get_all_groups(), *([data_group] if data_group else [])]:
            set_timeout(group, self.timeout_s)  # a mesh makes its groups with torch's half hour
        reduce.use(data_group)
        if self._policy.param_dtype is not None:
            self.precision_plugin = Precision()  # Lightning's would cast the weights themselves

    def lay_out(self, device_type: str, world_size: int, precision: str) -> None:
        """Arrange the processes of the default group, and say in what blocks compute."""
        unit = self.replicate_size * self.tensor_parallel_size
        shape = (self.replicate_size, world_size // unit, self.tensor_parallel_size)
        self._device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=_AXES)
        if precision == "bf16-true":
            self._policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def _data_group(self) -> dist.ProcessGroup | None:
        """The processes that read different data, this one among them; None for all."""
        if self.tensor_parallel_size == 1:
            return None
        return self.device_mesh["replicate", "shard"]._flatten("data").get_group()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Which share of the data is this process's; those of one tensor axis have the same."""
        size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    def teardown(self) -> None:
        reduce.use(None)
        super().teardown()

    # Building

    @contextlib.contextmanager
    def model_sharded_context(self) -> Generator[None]:
        with torch.device("meta"):
            yield

    def setup(self, trainer: L.Trainer) -> None:
        network = network_of(self.lightning_module)
        compile = resolve(self.compile, network, self.root_device, spread=True)
        dtype = self._policy.param_dtype or dtype_of(trainer.precision)
        n_data, n_shares = self.n_data_processes(self.world_size), self.tensor_parallel_size
        self.choose_attention(trainer, network, dtype, n_data, n_shares, compiled=compile != "none")
        self.place(network, compile, vocabulary_multiple(self.root_device))
        if n_shares == 1:  # else the scores are gathered in between
            quicken_loss(self.lightning_module, self.root_device, compiled=compile != "none")
        materialise(network, self.root_device)
        super().setup(trainer)
        seed_dropout(self.distributed_sampler_kwargs["rank"])

    def place(
        self, network: Transformer, compile: Literal["none", "blocks", "whole"], vocabulary_multiple: int
    ) -> None:
        """Change, compile and spread a network on the meta device, once the processes are laid out."""
        apply(
            network,
            tensor_mesh=self.device_mesh["tensor"] if self.tensor_parallel_size > 1 else None,
            float8=self.float8,
            checkpointing=self.checkpointing,
            compile=compile,
            shard=partial(self._shard, mesh=self._data_mesh()),
            vocabulary_multiple=vocabulary_multiple,
        )

    def _data_mesh(self) -> DeviceMesh:
        """One axis shards; with a second before it, each row of the mesh is a replica."""
        return self.device_mesh["replicate", "shard"] if self.replicate_size > 1 else self.device_mesh["shard"]

    def _shard(self, network: Transformer, mesh: DeviceMesh) -> None:
        """Each block is gathered by itself; what is around the blocks is one more group, needed at both ends of the
        forward and at once in the backward, so it stays gathered between them."""
        for block in network.blocks:
            fully_shard(block, mesh=mesh, mp_policy=self._policy, reshard_after_forward=self.reshard_after_forward)
        fully_shard(network, mesh=mesh, mp_policy=self._policy, reshard_after_forward=False)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Add gradients up where they are, unsharded, and send nothing."""
        network: Any = network_of(self.lightning_module)
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
