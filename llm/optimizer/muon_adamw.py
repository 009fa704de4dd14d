"""Muon and AdamW as one torch optimizer, so that schedules, clipping and checkpoints see a single object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llm.optimizer.closure import evaluated
from llm.optimizer.fused_adamw import FusedAdamW
from llm.optimizer.groups import adamw_factor, at_their_rates, decay_groups, hidden_matrices, muon_factor
from llm.optimizer.muon import Muon


class MuonAdamW(Optimizer):
    """Each parameter group carries `algorithm`, "muon" or "adamw", and is stepped by the optimizer of that name, which
    there is where it has something to step: an adapter's matrices are all Muon's.

    The two inner optimizers own nothing: they look at this object's groups and state, so `state_dict` is the usual one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        matrices = hidden_matrices(model)
        taken = {id(p) for p in matrices}
        hidden = at_their_rates(model, [{"params": matrices, "weight_decay": weight_decay}], lr, muon_factor)
        rest = [
            {**group, "params": [p for p in group["params"] if id(p) not in taken]}
            for group in decay_groups(model, weight_decay)
        ]
        rest = at_their_rates(model, rest, lr, adamw_factor)
        self.inner: dict[str, Optimizer] = {}
        if hidden:
            self.inner["muon"] = Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum)
        if rest:
            self.inner["adamw"] = FusedAdamW(rest, lr=lr, betas=betas, eps=eps)
        groups = [
            {"algorithm": name, **group} for name, optimizer in self.inner.items() for group in optimizer.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure`, if given, runs first, under grad, and its value is returned."""
        result = evaluated(closure)
        for name, optimizer in self.inner.items():
            # Linked anew each time: load_state_dict replaces both attributes of this object.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            optimizer.step()
        return result
