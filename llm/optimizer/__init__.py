"""Optimizer recipes: frozen hyper-parameters that build a torch optimizer once the parameters exist.

Importing this module loads no torch, so that a mistake in the configuration is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Interval

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Fraction = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused; matrices decay, norms and biases do not.

    Args:
        lr: peak learning rate; the schedule multiplies it.
        weight_decay: decoupled decay, per step `lr * weight_decay`.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        clip_norm: largest L2 norm of the whole gradient; null leaves it unclipped (it is logged all the same).
    """

    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Gt(0)] = 1e-8
    clip_norm: Annotated[float, Gt(0)] | None = 1.0

    def build(self, model: nn.Module) -> Optimizer:
        """The torch optimizer over `model`'s parameters."""
        from llm.optimizer.fused_adamw import FusedAdamW
        from llm.optimizer.groups import adamw_factor, at_their_rates, decay_groups

        groups = at_their_rates(model, decay_groups(model, self.weight_decay), self.lr, adamw_factor)
        return FusedAdamW(groups, lr=self.lr, betas=_pair(self.betas), eps=self.eps)


@dataclass(frozen=True)
class MuonAdamW:
    """Muon for the matrices inside the network, AdamW for embeddings, head, norms and biases, behind one optimizer.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix; its update is scaled to AdamW's size (Liu et
    al. 2025, arXiv:2502.16982, section 2.2), so one `lr` and one `weight_decay` serve both.

    Args:
        lr: peak learning rate of both; the schedule multiplies it.
        weight_decay: decoupled decay of all matrices.
        momentum: Muon's Nesterov momentum.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        clip_norm: largest L2 norm of the whole gradient; null leaves it unclipped.
    """

    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)] = 0.1
    momentum: Fraction = 0.95
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Gt(0)] = 1e-8
    clip_norm: Annotated[float, Gt(0)] | None = 1.0

    def build(self, model: nn.Module) -> Optimizer:
        """The one optimizer over `model`'s parameters."""
        from llm.optimizer import muon_adamw

        return muon_adamw.MuonAdamW(
            model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            betas=_pair(self.betas),
            eps=self.eps,
        )


def _pair(betas: Sequence[float]) -> tuple[float, float]:
    """YAML gives a list where torch wants a tuple."""
    first, second = betas
    return first, second
