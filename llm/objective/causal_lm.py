"""Next-token prediction."""

from __future__ import annotations

from typing import ClassVar

from llm.metric import bits_per_byte
from llm.objective.base import Objective
from llm.objective.given import Batch
from llm.objective.loss import Loss, n_labels
from llm.reduce import Sum


class CausalLM(Objective):
    """Each token from those before it in its document (Radford et al. 2019).

    Whether a document is in its own order or with its middle at the end (Bavarian et al. 2022) is the data's affair.
    A batch holds `tokens`, `labels` and, unless each row is one document, `documents` and `positions`, all [B, T];
    validation adds `n_bytes` [B], so that the loss can be told per byte of text, which compares across tokenizers. A
    row of 0 bytes is left out of that.
    """

    family: ClassVar[str] = "decoder"

    def counts(self, batch: Batch) -> dict[str, int]:
        """The predicted tokens."""
        return {"loss": n_labels(batch["labels"])}

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Cross-entropy in nats."""
        documents, positions = batch.get("documents"), batch.get("positions")
        hidden = self.network(batch["tokens"], documents=documents, positions=positions)  # [B, T, D]
        return {"loss": self.token_loss(hidden, batch["labels"])}

    def validation_sums(self, batch: Batch, parts: dict[str, Loss]) -> dict[str, Sum]:
        """Nats and bytes of the text."""
        n_bytes, rows = batch.get("n_bytes"), parts["loss"].rows
        if n_bytes is None or rows is None:
            return {}
        return {"text": ((rows[0] * (n_bytes > 0)).sum(), n_bytes.sum())}

    def validation_metrics(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """`val/loss` in nats per token and, of text, `val/bits_per_byte`."""
        nats, n_bytes = totals.pop("text", (0.0, 0.0))
        metrics = super().validation_metrics(totals)
        return {**metrics, "val/bits_per_byte": bits_per_byte(nats, n_bytes)} if n_bytes else metrics
