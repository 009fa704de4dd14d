"""Tokens from all that surrounds them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from llm.objective.base import Objective
from llm.objective.given import Batch
from llm.objective.loss import IGNORED, Loss, gathered, n_labels, token_nats

GRANULE = 128  # logits come in few shapes, whose memory is found again


class MaskedLM(Objective):
    """Hidden tokens from those on both sides and, of pairs of texts, whether the second follows the first (Devlin et
    al. 2019, arXiv:1810.04805).

    A batch holds `tokens`, `labels`, `documents`, `positions` and `segments`, all [B, T], with labels where a token is
    predicted; the logits of other places are never computed. With pairs it also holds `cls_at` [B, P], where in the row
    each pair's first token is, and `pair_labels` [B, P], 0 = follows, 1 = from elsewhere, IGNORED = no pair.

    `train/loss` and `val/loss` are of the tokens alone. With pairs there are also `next_sentence_loss`, of equal
    weight, `next_sentence_accuracy`, and `next_sentence_pairs`, of how many the accuracy is.
    """

    family: ClassVar[str] = "encoder"

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find the predicted places while the labels are on the host: on a device their number is only known by waiting
        for it."""
        for micro_batch in batch.micro_batches:
            micro_batch |= places(micro_batch["labels"])
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def counts(self, batch: Batch) -> dict[str, int]:
        """The predicted tokens, and the pairs."""
        counts = {"loss": n_labels(batch["labels"])}
        if "pair_labels" in batch:
            counts["next_sentence_loss"] = counts["next_sentence_accuracy"] = n_labels(batch["pair_labels"])
        return counts

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Cross-entropy in nats of tokens and of pairs."""
        hidden = self.network(
            batch["tokens"],
            documents=batch["documents"],
            positions=batch["positions"],
            segments=batch.get("segments"),
        )  # [B, T, D]
        found = batch if "predicted_at" in batch else places(batch["labels"])
        at, labels = found["predicted_at"], found["predicted_labels"]  # [N]
        chosen = hidden.flatten(0, 1)[at]
        if self.by_row:
            loss = gathered(self.nats(chosen, labels), labels, at // hidden.shape[1], len(hidden))
        else:
            loss = Loss(self.nats(chosen, labels, "sum"))
        return {"loss": loss, **(self._pairs(hidden, batch) if "pair_labels" in batch else {})}

    def means(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """With the accuracy, of how many pairs it is: without that it has no confidence interval."""
        means = super().means(totals)
        if "next_sentence_accuracy" in means:
            means["next_sentence_pairs"] = totals["next_sentence_accuracy"][1]
        return means

    def _pairs(self, hidden: Tensor, batch: Batch) -> dict[str, Loss]:
        """The loss of the pairs, and how often the likelier answer is right."""
        labels = batch["pair_labels"]  # [B, P]
        at = batch["cls_at"].clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = self.network.sentence_logits(hidden.gather(1, at))  # [B, P, 2]
        nats = token_nats(logits.flatten(0, 1), labels.flatten(), "sum")
        n_right = (logits.detach().argmax(-1) == labels).sum()
        return {
            "next_sentence_loss": Loss(nats),
            "next_sentence_accuracy": Loss(n_right, weight=0.0),
        }


def places(labels: Tensor) -> MutableMapping[str, Tensor]:
    """Where labels [B, T] are predicted: `predicted_at` [N], places in the flattened batch, and `predicted_labels` [N].

    N is rounded up; the places too many are place 0 with label IGNORED. Page-locked where `labels` are.
    """
    flat = labels.flatten()
    at = (flat != IGNORED).nonzero().squeeze(1)
    n_more = -len(at) % GRANULE if len(at) else GRANULE
    found = {
        "predicted_at": F.pad(at, (0, n_more)),
        "predicted_labels": F.pad(flat[at], (0, n_more), value=IGNORED),
    }
    return {name: value.pin_memory() for name, value in found.items()} if labels.is_pinned() else found
