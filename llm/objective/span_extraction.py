"""Where in a text an answer is."""

from __future__ import annotations

from typing import ClassVar

import torch

from llm.objective.given import Batch
from llm.objective.labelled import Headed
from llm.objective.loss import Loss, n_labels, token_nats


class SpanExtraction(Headed):
    """The first and the last token of the answer to a question, or the first of all where there is none (Devlin et al.
    2019, sections 4.2 and 4.3): each from a softmax over the row.

    A batch holds `tokens`, `documents`, `positions` and `segments`, all [B, T], one question and a part of its context
    in each row, and `start_labels` and `end_labels`, [B, 1], places in the row.

    The loss is the mean of the two. Validation adds how often both are found, `val/accuracy`, window by window;
    `python -m llm evaluate` says how often the answer is.
    """

    answers: ClassVar[str] = "span"
    predicts: ClassVar[str] = "start_labels"

    def counts(self, batch: Batch) -> dict[str, int]:
        """The rows with a question."""
        n = n_labels(batch["start_labels"])
        return {"loss": n, "accuracy": n}

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Half the cross-entropy of both ends in nats, and how often both are right."""
        scores = self.network.label_logits(self.encoded(batch)).float()  # [B, T, 2]
        scores = scores.masked_fill((batch["documents"] == 0).unsqueeze(-1), -torch.inf)
        ends = torch.stack([batch["start_labels"][:, 0], batch["end_labels"][:, 0]])  # [2, B]
        by_end = scores.permute(2, 0, 1)  # [2, B, T]
        # A row that is filled up has no question, and nothing but padding: no softmax is to be taken of it.
        by_end = by_end.masked_fill((ends < 0).unsqueeze(-1), 0.0)
        nats = token_nats(by_end.flatten(0, 1), ends.flatten()).view_as(ends).sum(0) / 2  # [B]
        right = (by_end.detach().argmax(-1) == ends).all(0)
        rows = (nats.detach(), (ends[0] >= 0).long())
        return {"loss": Loss(nats.sum(), rows=rows), "accuracy": Loss(right.sum(), weight=0.0)}

    @property
    def n_outcomes(self) -> int:
        """The places of a row."""
        return self.model_config.max_length
