"""What a data loader reads: step N as one process sees it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

from llm.data.collate import Settings, Step, assemble_mixture, label_bytes, to_step
from llm.data.examples import ExampleRows
from llm.data.order import Order
from llm.data.prepare import Rows
from llm.data.task import NextToken

Share = tuple[int, int, int | None]  # rank, world size, rows at once


class TrainSteps(Dataset[Step]):
    """Step N as one process sees it: its slice of the global batch."""

    def __init__(
        self, parts: list[Rows | ExampleRows], tasks: np.ndarray, place: Share, settings: Settings, order: Order
    ) -> None:
        self.parts, self.tasks, self.place, self.settings, self.order = parts, tasks, place, settings, order

    def __getitem__(self, index: int) -> Step:
        rank, world_size, micro_batch_size = self.place
        slots = self.order.batch(index)
        share = len(slots.row) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        part = slots.source[mine]
        arrays = assemble_mixture(self.parts, part, slots.row[mine], slots.epoch[mine], self.settings)
        arrays["tasks"] = self.tasks[part]
        return to_step(index, arrays, micro_batch_size or share, documents=self.settings.documents)


class ValSteps(Dataset[Step]):
    """The held-out rows in order, so many at a time over all processes that step N has the same rows for any number of
    them. The last step may have fewer micro-batches, but all are of one size, filled up with empty rows: what is
    compiled for one shape would be compiled again for another. Noise is that of one epoch, so that values compare.
    """

    def __init__(
        self,
        parts: list[Rows | ExampleRows],
        tasks: np.ndarray,
        place: Share,
        settings: Settings,
        batch_size: int,
        token_bytes: np.ndarray | None,
    ) -> None:
        self.parts, self.tasks, self.place, self.settings = parts, tasks, place, settings
        self.batch_size, self.token_bytes = batch_size, token_bytes
        self.ends = np.cumsum([len(rows) for rows in parts])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.batch_size)

    def __getitem__(self, index: int) -> Step:
        rank, world_size, micro_batch_size = self.place
        first = index * self.batch_size
        share = -(-min(self.batch_size, int(self.ends[-1]) - first) // world_size)
        at_once = micro_batch_size or -(-self.batch_size // world_size)
        place = np.arange(-(-share // at_once) * at_once)
        sample = first + rank * share + place
        part = np.searchsorted(self.ends, sample, side="right")
        empty = (part == len(self.ends)) | (place >= share)
        part[empty] = 0
        row = np.where(empty, -1, sample - (self.ends - np.diff(self.ends, prepend=0))[part])
        arrays = assemble_mixture(self.parts, part, row, np.zeros_like(row), self.settings)
        arrays["tasks"] = self.tasks[part]
        if self.token_bytes is not None:
            is_text = np.array([isinstance(rows.task, NextToken) for rows in self.parts])[part]
            arrays["n_bytes"] = np.where(is_text, label_bytes(arrays["labels"], self.token_bytes), 0)
        return to_step(index, arrays, at_once, documents=self.settings.documents)


class From(Sampler[int]):
    """Counts from `first` to `last`; its length is `last`, as the trainer counts the steps of the whole run."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last
