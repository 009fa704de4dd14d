"""A target from a source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from llm.guard import Guard
from llm.model import Source, TransformerConfig
from llm.objective.base import Objective
from llm.objective.given import Adapter, Batch, OptimizerRecipe
from llm.objective.loss import Loss, n_labels


class Seq2Seq(Objective):
    """Each token of a target from its source and the target's tokens before it, which are the true ones (teacher
    forcing): span denoising (Raffel et al. 2020, arXiv:1910.10683), translation (Vaswani et al. 2017).

    A batch holds `source_tokens`, `source_documents` and `source_positions`, all [B, S], and `tokens`, `labels`,
    `documents` and `positions`, all [B, T], where `tokens` are the labels one place later. Document n of a row's target
    is written from document n of its source. With `label_smoothing` that share of each label is spread over the whole
    vocabulary (Vaswani et al. 2017 take 0.1), in training alone: `train/loss` is then another one than `val/loss`.
    """

    family: ClassVar[str] = "encoder_decoder"

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerRecipe,
        schedule: Callable[[int], float],
        guard: Guard | None = None,
        init_from: str | None = None,
        logits_at_once: Annotated[int, Gt(0)] | None = None,
        adapter: Adapter | None = None,
        label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        super().__init__(model, optimizer, schedule, guard, init_from, logits_at_once, adapter)
        self.label_smoothing = label_smoothing

    def counts(self, batch: Batch) -> dict[str, int]:
        """The predicted tokens."""
        return {"loss": n_labels(batch["labels"])}

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Cross-entropy in nats."""
        source = Source(batch["source_tokens"], batch["source_documents"], batch["source_positions"])
        hidden = self.network(
            batch["tokens"], documents=batch["documents"], positions=batch["positions"], source=source
        )  # [B, T, D]
        return {"loss": self.token_loss(hidden, batch["labels"])}
