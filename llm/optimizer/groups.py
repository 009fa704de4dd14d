"""Which parameters decay, and which ones Muon may take."""

from __future__ import annotations

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
