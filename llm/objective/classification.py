"""One of a set of labels for a text, or for each of its words."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llm.objective.given import Batch
from llm.objective.labelled import Labelled


class Classification(Labelled):
    """The label of a text or of a pair of texts, from its first token (Devlin et al. 2019).

    A batch holds `tokens`, `documents`, `positions` and `segments`, all [B, T], and of each text in a row `cls_at`
    [B, P], where its first token is, and `class_labels` [B, P], IGNORED where there is none.
    """

    answers: ClassVar[str] = "label"
    predicts: ClassVar[str] = "class_labels"

    def chosen(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Those of first tokens."""
        at = batch["cls_at"].unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, at)


class TokenClassification(Labelled):
    """The label of each word, from the word's first token (Devlin et al. 2019, section 5.3).

    A batch holds `tokens`, `documents`, `positions`, `segments` and `labels`, all [B, T], IGNORED where no word begins.
    """

    answers: ClassVar[str] = "tags"

    def chosen(self, hidden: Tensor, batch: Batch) -> Tensor:
        """All."""
        return hidden
