"""Which parameters decay, which ones Muon may take, and whose learning rate is another one in a wider network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices and embeddings decay; norms and biases, which are vectors, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied weight is listed once
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers that map hidden states to hidden states: Muon's share.

    Embeddings and what gives scores are left out (Jordan et al. 2024): their rows are tokens or classes, not directions
    of one space.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = ((name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [
        weight
        for name, weight in linears
        if weight.requires_grad
        and id(weight) not in embeddings
        and name.rpartition(".")[2] not in ("head", "next_sentence", "classifier")
    ]


Shape = Sequence[float]  # outputs, inputs
Factor = Callable[[Shape, Shape], float]


def adamw_factor(now: Shape, base: Shape) -> float:
    """AdamW moves all entries by as much and in concert: what that changes adds up over the inputs (Yang et al. 2022,
    arXiv:2203.03466, table 3)."""
    return base[1] / now[1]


def muon_factor(now: Shape, base: Shape) -> float:
    """A matrix has to change by sqrt(outputs / inputs) in spectral norm (Yang, Simon and Bernstein 2023,
    arXiv:2310.17813, condition 1), and Muon changes it by sqrt(max(outputs, inputs)): where all widths grow alike, by
    too much as the root of that."""
    wanted, made = (lambda shape: shape[0] / shape[1]), max
    return math.sqrt(wanted(now) / wanted(base) / (made(now) / made(base)))


def at_their_rates(
    model: nn.Module, groups: Sequence[dict[str, Any]], lr: float, factor: Factor
) -> list[dict[str, Any]]:
    """Each group with `lr`, and in groups beside it the weights of layers that carry a `base_shape`, the shape in the
    network that `lr` was chosen for, with a factor of `lr`.

    A weight decays by lr * weight_decay in a step as it did there: that is after how many steps it is forgotten, and
    learning rates do not transfer without it (Wang and Aitchison 2024, arXiv:2405.13698).
    """
    layers: Any = [module for module in model.modules() if getattr(module, "base_shape", None) is not None]
    bases: dict[int, Shape] = {id(layer.weight): layer.base_shape for layer in layers}
    return [
        {**group, "params": parameters, "lr": lr * times, "weight_decay": group["weight_decay"] / times}
        for group in groups
        for times, parameters in _by_factor(group["params"], bases, factor).items()
    ]


def _by_factor(parameters: Iterable[Tensor], bases: dict[int, Shape], factor: Factor) -> dict[float, list[Tensor]]:
    found: dict[float, list[Tensor]] = {}
    for parameter in parameters:
        base = bases.get(id(parameter))
        times = 1.0 if base is None else round(factor(parameter.shape, base), 9)  # so that equal ones are equal
        found.setdefault(times, []).append(parameter)
    return found
