"""Micro-batches that nobody has prepared: the fields and shapes of what `llm/data` would give an objective."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm.data import TextData
from llm.data.task import Masking
from llm.objective.masked_lm import GRANULE


@dataclass(frozen=True)
class Rows:
    """Of one micro-batch on one process.

    Attributes:
        n: how many.
        length: positions of each, of an encoder-decoder those of the source.
        target: positions of an encoder-decoder's target; 0: there is none.
        scored: positions whose scores over the vocabulary are computed.
        labelled: positions whose scores of labels are.
        texts: of a row, where texts have a label each. Data decides, and it hardly matters.
    """

    n: int
    length: int
    target: int
    scored: int
    labelled: int = 0
    texts: int = 8

    @property
    def tokens(self) -> int:
        """Positions, on both sides."""
        return self.n * (self.length + self.target)


def rows_of(data: TextData, n_data_processes: int) -> Rows:
    """What each process computes at once."""
    n = data.micro_batch_size or data.batch_size // n_data_processes
    target = data.target_length or 0 if data.family == "encoder_decoder" else 0
    if data.answers not in ("vocabulary", "preference"):
        scored = 0
    elif data.family == "encoder":
        rates = [task.rate for task in data.tasks.values() if isinstance(task, Masking)]
        scored = -(-round(n * data.max_length * sum(rates) / len(rates)) // GRANULE) * GRANULE
    else:
        scored = n * (target or data.max_length)
    rows = Rows(n, data.max_length, target, scored)
    labelled = {"label": n * rows.texts, "tags": n * rows.length, "span": n * rows.length}.get(data.answers, 0)
    return replace(rows, labelled=labelled)


def batch(data: TextData, rows: Rows, *, documents: bool) -> dict[str, Tensor]:
    """Zeros, int64.

    Args:
        data: which says what is in a batch.
        rows: of what size.
        documents: whether rows say which document each token is of.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long)

    own = (rows.n, rows.target or rows.length)
    fields = {"tokens": zeros(*own), "labels": zeros(*own)}
    placed = {name: zeros(*own) for name in ("documents", "positions")} if documents else {}
    fields |= placed
    if data.family == "encoder":
        fields["segments"] = zeros(*own)
    if rows.target:
        names = ("tokens", "documents", "positions")
        fields |= {f"source_{name}": zeros(rows.n, rows.length) for name in names}
    if data.answers == "vocabulary" and data.family == "encoder":
        fields |= {"predicted_at": zeros(rows.scored), "predicted_labels": zeros(rows.scored)}
    if data.answers == "preference":
        fields |= {f"rejected_{name}": zeros(*own) for name in ("tokens", "labels", "documents", "positions")}
    whole = {"label": ("cls_at", "class_labels"), "preference": ("pairs",)}.get(data.answers, ())
    if data.has_pairs:
        whole = ("cls_at", "pair_labels")
    fields |= {name: zeros(rows.n, rows.texts) for name in whole}
    if data.answers == "span":
        fields |= {name: zeros(rows.n, 1) for name in ("start_labels", "end_labels")}
    return fields | {name: zeros(rows.n) for name in ("samples", "tasks")}
