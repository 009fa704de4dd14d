"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor

from llm.metric import bits_per_byte
from llm.objective.base import Batch, Objective
from llm.objective.loss import Loss, cross_entropy, n_labels


class CausalLM(Objective):
    """Each token from those before it in its document (Radford et al. 2019).

    A batch holds `tokens`, `labels`, `documents` and `positions`, all [B, T]; validation adds `n_bytes` [B], so that
    the loss can be told per byte of text, which compares across tokenizers.
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The predicted tokens."""
        return {"loss": n_labels(batch["labels"])}

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Cross-entropy in nats."""
        hidden = self.network(batch["tokens"], documents=batch["documents"], positions=batch["positions"])  # [B, T, D]
        return {"loss": cross_entropy(self.network.logits(hidden), batch["labels"])}

    def validation_totals(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The loss, and the bytes that it was about."""
        n_bytes = batch["n_bytes"].sum()
        return {**super().validation_totals(batch), "n_bytes": (n_bytes, n_bytes)}

    def validation_metrics(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """`val/loss` in nats per token and `val/bits_per_byte`."""
        n_bytes, _ = totals.pop("n_bytes")
        return {**super().validation_metrics(totals), "val/bits_per_byte": bits_per_byte(totals["loss"][0], n_bytes)}
