"""A target from a source."""

from __future__ import annotations

from typing import ClassVar

from llm.model import Source
from llm.objective.base import Batch, Objective
from llm.objective.loss import Loss, n_labels


class Seq2Seq(Objective):
    """Each token of a target from its source and the target's tokens before it, which are the true ones (teacher
    forcing): span denoising (Raffel et al. 2020, arXiv:1910.10683), translation (Vaswani et al. 2017).

    A batch holds `source_tokens`, `source_documents` and `source_positions`, all [B, S], and `tokens`, `labels`,
    `documents` and `positions`, all [B, T], where `tokens` are the labels one place later. Document n of a row's target
    is written from document n of its source.
    """

    family: ClassVar[str] = "encoder_decoder"

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
