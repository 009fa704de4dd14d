"""Between a whole tensor and the part of it that this process holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only


def place(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` as `like` lies: on its device and, if that is spread over processes, this one's part of it.

    Nothing is sent: every process has the whole.
    """
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole


def gather(state: Any, keep: bool) -> Any:
    """`state`, nested lists and dicts, with every spread tensor whole and on the CPU, one after the other.

    Collective: all processes call it with the same structure. Those that do not `keep` the result get None in the place
    of tensors, so that only one of them needs the memory.
    """

    def whole(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().cpu() if keep else None

    return tree_map_only(torch.Tensor, whole, state)


def load_whole(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """`module.load_state_dict` of whole tensors into parameters that may be spread over processes."""
    current = module.state_dict()
    placed = {name: place(value, current[name]) if name in current else value for name, value in state.items()}
    module.load_state_dict(placed, strict=strict)


def load_whole_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole tensors; those that are as large as their parameter lie as it does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def placed(index: int, value: Any) -> Any:
        parameter = parameters[index]
        spread = isinstance(value, Tensor) and value.shape == parameter.shape
        return place(value, parameter) if spread else value

    per_parameter = {
        index: {name: placed(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})
