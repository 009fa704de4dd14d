"""The gradient's norm, and scaling it down."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm.reduce.collectives import distributed


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to the L2 norm `max_norm` (None: leave them), together; returns their norm before that.
    No host sync.

    Gradients may be spread over processes, and not all of them in the same way: torch's own function stacks the norms
    of all parameters, which is refused across meshes. Plain ones, on one device, have not to be sorted first.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not distributed() or not any(isinstance(gradient, DTensor) for gradient in gradients):
        return _clip_plain(gradients, max_norm)
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if max_norm is not None:
        for group in by_mesh.values():
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _clip_plain(gradients: list[Tensor], max_norm: float | None) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, to the bit."""
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
