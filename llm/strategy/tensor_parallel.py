"""Tensor parallelism: every matrix product of a block split over the ranks of one mesh axis (Shoeybi et al. 2019,
arXiv:1909.08053), from a plan keyed by the names of submodules. The model knows nothing of it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llm.model import Transformer, TransformerConfig


class Whole(ParallelStyle):
    """The module's parameters as DTensors that every rank holds in full.

    So all parameters lie on one mesh, as the fused optimizers and the gradient norm want them. `placement` says how the
    input, and so the output, lies over the ranks: with Shard(2) each sees its own heads, and the gradient of the
    parameters, a part on each, is summed.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        super().__init__()
        self.placement = placement or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(_spread(value, device_mesh, self.placement) for value in inputs)

        def leave(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output.to_local() if isinstance(output, DTensor) else output

        distribute_module(module, device_mesh)  # without a partition function: replicated
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def _spread(value: Any, device_mesh: DeviceMesh, placement: Placement) -> Any:
    """A tensor as this rank's part of one that all ranks hold; what is no tensor stays."""
    if not isinstance(value, Tensor):
        return value
    return DTensor.from_local(value, device_mesh, [placement], run_check=False)


class SharedInput(ParallelStyle):
    """The tensors that a module is called with, whole on every rank, once for all the projections that read them.

    So their gradients, of which each rank has a part, are added before they are summed over the ranks: one all-reduce
    instead of one per projection.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(_spread(value, device_mesh, Replicate()) for value in inputs)

        module.register_forward_pre_hook(enter)
        return module


class VocabularyParallel(RowwiseParallel):
    """An embedding whose rows, tokens, are split: each rank looks its own ones up, and the sum has them all."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate())

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def settle(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            # Still on its way, the sum is a tensor of another class, whose gradient a compiled block loses (torch
            # 2.13).
            return output.clone()

        module = super()._apply(module, device_mesh)
        module.register_forward_hook(settle)
        return module


def plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Name of a submodule -> how it is split: heads, hidden channels and the vocabulary by rank.

    Two all-reduces in each direction of a block, one for the embedding, and for the logits an all-gather forward and an
    all-reduce back.
    """
    styles: dict[str, ParallelStyle] = {
        "embed": VocabularyParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
        "*.blocks.*.*attention": SharedInput(),
        "*.blocks.*.*attention.query": ColwiseParallel(),
        "*.blocks.*.*attention.key": ColwiseParallel(),
        "*.blocks.*.*attention.value": ColwiseParallel(),
        "*.blocks.*.*attention.out": RowwiseParallel(),
        "*.blocks.*.*attention.query_norm": Whole(Shard(2)),  # [B, T, H, K]
        "*.blocks.*.*attention.key_norm": Whole(Shard(2)),
        "*.blocks.*.feed_forward": SharedInput(),
        "*.blocks.*.feed_forward.gate": ColwiseParallel(),
        "*.blocks.*.feed_forward.up": ColwiseParallel(),
        "*.blocks.*.feed_forward.down": RowwiseParallel(),
        "*.blocks.*.*_norm": Whole(),
        "*.norm": Whole(),
        "*.embed_norm": Whole(),
        "*.position.table": Whole(),
        "*.relative.table": ColwiseParallel(),  # a column is a head
        "*.segment": Whole(),
        "transform.*": Whole(),
        "pooler": Whole(),
        "next_sentence": Whole(),
        "classifier": Whole(),
    }
    return {
        name: style
        for name, module in model.named_modules()
        for pattern, style in styles.items()
        if _matches(name, pattern) and any(True for _ in module.parameters())
    }


def _matches(name: str, pattern: str) -> bool:
    """Part by part: `*` stands for one name between two dots."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def split(model: Transformer, mesh: DeviceMesh) -> None:
    """Apply the plan in place; a meta-device model stays one."""
    parallelize_module(model, mesh, plan(model))
    model.tie()  # the embedding and the head were split one by one
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not left, f"the tensor-parallel plan does not name {left}"


def problems(config: TransformerConfig, size: int) -> list[str]:
    """One line for each width of the model that `size` ranks cannot share evenly; a vocabulary they can share
    unevenly."""
    widths = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads, "ffn_dim": config.ffn_width}
    return [
        f"strategy.tensor_parallel_size: {size} - must divide model.{key}, which is {value} - change one of the two"
        for key, value in widths.items()
        if value % size
    ]
