"""Between a whole tensor and the part of it that this process holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def place(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` as `like` lies: on its device and, if that is spread over processes, this one's part of it.

    Nothing is sent: every process has the whole.
    """
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` without the second names of weights that have several: a tied head's."""
    first = {name for name, _ in module.named_parameters()}
    second = {name for name, _ in module.named_parameters(remove_duplicate=False)} - first
    return {name: value for name, value in module.state_dict().items() if name not in second}


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into weights that may be spread over processes; those not in `state` keep what they have."""
    current = module.state_dict()
    module.load_state_dict({name: place(value, current[name]) for name, value in state.items()}, strict=False)
