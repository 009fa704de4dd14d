"""What an objective is given: by the configuration, and by the data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

Batch = Mapping[str, Tensor]


class OptimizerRecipe(Protocol):
    """What `conf/optimizer` gives: hyper-parameters that build an optimizer once there are weights."""

    @property
    def lr(self) -> float:
        """The peak learning rate, which groups of parameters may have a factor of."""

    @property
    def clip_norm(self) -> float | None:
        """Largest L2 norm of the gradient; None does not clip."""

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over the model's parameters."""


class Adapter(Protocol):
    """What `conf/adapter` gives."""

    def attach(self, network: nn.Module, anew: Collection[str] = ()) -> None:
        """Change the network in place, and freeze what is not trained; weights that start `anew` are."""


class Step(Protocol):
    """What `llm/data` gives: this process's share of one optimizer step."""

    @property
    def index(self) -> int:
        """Number of the batch in the run's one global order."""

    @property
    def micro_batches(self) -> list[Batch]:
        """What is run forward and backward one after the other."""

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding left out, on all sides."""

    counts: list[dict[str, int]]  # of each micro-batch what `Objective.counts` says
