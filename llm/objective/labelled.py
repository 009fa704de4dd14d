"""What objectives share that choose from labels: one head on an encoder, and who was taken for whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from llm.guard import Guard
from llm.metric import confusion_metrics
from llm.model import TransformerConfig
from llm.objective.base import Objective
from llm.objective.given import Adapter, Batch, OptimizerRecipe
from llm.objective.loss import IGNORED, Loss, n_labels, token_nats
from llm.reduce import all_sum


class Headed(Objective):
    """An encoder with a head that is not the vocabulary's."""

    family: ClassVar[str] = "encoder"

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerRecipe,
        schedule: Callable[[int], float],
        guard: Guard | None = None,
        init_from: str | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(model, optimizer, schedule, guard, init_from, adapter=adapter)

    def encoded(self, batch: Batch) -> Tensor:
        """Hidden states [B, T, D] of `tokens`, `documents`, `positions` and `segments`, all [B, T]."""
        return self.network(
            batch["tokens"],
            documents=batch["documents"],
            positions=batch["positions"],
            segments=batch["segments"] if self.model_config.n_segments else None,
        )


class Labelled(Headed):
    """The label that is in the field `predicts` of a batch, IGNORED where there is none; subclasses say from which
    hidden states.

    Validation adds the accuracy, the mean F1 of the labels (macro) and Matthews' correlation, over the whole set.
    """

    confused: Tensor | None = None  # int64 [labels, labels]: how often the first was taken for the second

    def chosen(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states [B, T, D] -> those to be labelled, [B, N, D] for labels [B, N]."""
        raise AssertionError(f"{type(self).__name__} has to say what is labelled")

    def counts(self, batch: Batch) -> dict[str, int]:
        """The labels."""
        n = n_labels(batch[self.predicts])
        return {"loss": n, "accuracy": n}

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Cross-entropy in nats, and how many are right."""
        labels = batch[self.predicts]  # [B, N]
        logits = self.network.label_logits(self.chosen(self.encoded(batch), batch))  # [B, N, labels]
        nats = token_nats(logits.flatten(0, 1), labels.flatten()).view_as(labels)
        found = logits.detach().argmax(-1)
        if not self.training:
            self._count_confused(found, labels)
        rows = (nats.detach().sum(1), (labels != IGNORED).sum(1))
        return {"loss": Loss(nats.sum(), rows=rows), "accuracy": Loss((found == labels).sum(), weight=0.0)}

    def validation_metrics(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """`val/loss` and `val/accuracy`, and `val/macro_f1` and `val/mcc` from who was taken for whom."""
        metrics = super().validation_metrics(totals)
        confused, self.confused = self.confused, None
        if confused is not None:
            found = confusion_metrics(all_sum(confused).cpu().numpy())
            metrics |= {f"val/{name}": value for name, value in found.items()}
        return metrics

    def _count_confused(self, found: Tensor, labels: Tensor) -> None:
        n = self.n_outcomes
        if self.confused is None:
            self.confused = labels.new_zeros(n, n)
        real = labels != IGNORED
        pairs = torch.where(real, labels * n + found, 0).flatten()
        self.confused.view(-1).scatter_add_(0, pairs, real.flatten().to(labels.dtype))

    @property
    def n_outcomes(self) -> int:
        """The labels."""
        assert self.model_config.n_labels is not None
        return self.model_config.n_labels
