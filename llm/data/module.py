"""TextData: sources in, steps out. What run.py, the trainer and the callbacks see of the data."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from llm.data.collate import Step, assemble_mixture, label_bytes, split, to_batch
from llm.data.order import Order
from llm.data.prepare import FORMAT, Held, Recipe, Rows, prepare_rows, prepare_tokenizer, prepare_tokens
from llm.data.source import DataError, Files, Source, digest
from llm.launch import die_with_parent
from llm.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Prepared:
    """What preparation leaves behind: everything but the tokenizer is files."""

    tokenizer: Tokenizer
    train: dict[str, Rows]
    val: dict[str, Rows]


class TextData(LightningDataModule):
    """Packed rows of text for pretraining.

    Exactly one of `sources` (named, mixed by their weights) and `path` (files, whose text is in `column`) says what
    to read. Every `val_every`-th document of a source without validation files of its own is held out; None holds
    nothing out. `batch_size` counts the rows of one optimizer step over all processes; each process computes its
    share `micro_batch_size` rows at a time (None: all at once). With `document_mask` documents of one row do not see
    each other.
    """

    def __init__(
        self,
        tokenizer: Recipe,
        sources: Mapping[str, Source] | None = None,
        path: str | list[str] | None = None,
        column: str = "text",
        max_length: Annotated[int, Ge(1)] = 256,
        batch_size: Annotated[int, Ge(1)] = 64,
        micro_batch_size: Annotated[int, Ge(1)] | None = None,
        val_every: Annotated[int, Ge(2)] | None = 20,
        document_mask: bool = True,
        cache_dir: str = "~/.cache/llm-on-lightning",
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (sources is None) == (path is None):
            given = "neither is" if path is None else "both are"
            raise ValueError(
                f"data.path={path}: exactly one of data.sources and data.path says what to read, but {given} given; "
                "for files alone: data=files data.path=…"
            )
        if sources is not None and not sources:
            raise ValueError("data.sources is empty: name at least one source")
        if val_every is not None and val_every < 2:
            raise ValueError(f"data.val_every={val_every}: must be at least 2, or null to hold nothing out")
        self.recipe = tokenizer
        self.sources: dict[str, Source] = dict(sources or {"files": Files(path or "", column)})
        self.max_length = max_length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.val_every = val_every
        self.document_mask = document_mask
        self.cache_dir = Path(cache_dir).expanduser()
        self.num_workers = num_workers
        self.seed = seed
        self.next_batch = 0  # the first step of train_dataloader: 0, or where a checkpoint was taken

    # Preparation

    def prepare(self) -> None:
        """Build or find the tokenizer, the token files and the rows. Raises DataError; OSError for data.cache_dir."""
        _ = self._prepared

    def prepare_data(self) -> None:
        self.prepare()

    @cached_property
    def _prepared(self) -> _Prepared:
        tokenizer = prepare_tokenizer(self.recipe, self.sources, self.val_every, self.cache_dir)
        train: dict[str, Rows] = {}
        val: dict[str, Rows] = {}
        for name, source in self.sources.items():
            tokens = prepare_tokens(name, source, tokenizer, self.cache_dir)
            own = source.validation()
            every = self.val_every if own is None else None
            train[name] = prepare_rows(name, tokens, Held(every), self.max_length, self.cache_dir)
            if own is not None:
                own_tokens = prepare_tokens(name, own, tokenizer, self.cache_dir)
                val[name] = prepare_rows(name, own_tokens, Held(), self.max_length, self.cache_dir)
            elif every is not None:
                if tokens.meta["documents"] < every:
                    raise DataError(_too_few(name, tokens.meta["documents"], every))
                val[name] = prepare_rows(name, tokens, Held(every, out=True), self.max_length, self.cache_dir)
        return _Prepared(tokenizer, train, val)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._prepared.tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which tokens are in batch N."""
        total = sum(source.weight for source in self.sources.values())
        weights = {name: round(source.weight / total, 9) for name, source in self.sources.items()}
        contents = {
            name: (rows.tokens_cache.meta["content"], rows.rows_cache.meta["held"])
            for name, rows in self._prepared.train.items()
        }
        return {
            "the text or tokenizer": digest(FORMAT, contents, self.tokenizer.fingerprint),
            "the source weights": digest(weights),
            "data.max_length": self.max_length,
            "data.batch_size": self.batch_size,
            "data.document_mask": self.document_mask,
            "data.seed": self.seed,
        }

    @property
    def fingerprint(self) -> str:
        """Of the contents (not of where they lie) and of everything else that decides which tokens are in batch N."""
        return digest(self.settings)

    def report(self) -> dict[str, Any]:
        """What was prepared, as plain numbers and texts.

        By split ("train", "val") and source: documents (`empty` ones are left out), inputs (one more than tokens in a
        document; there are as many labels), rows, documents cut, and fill, the share of positions with an input.
        By source also bytes and bytes per token.
        """
        splits = {"train": self._prepared.train, "val": self._prepared.val}
        return {
            "tokenizer": type(self.recipe).__name__,
            "vocab_size": self.tokenizer.vocab_size,
            "max_length": self.max_length,
            "tokens_per_step": round(self.tokens_per_step, 1),
            "steps_per_epoch": self.n_steps(max_epochs=1),
            "cache_dir": str(self.cache_dir),
            "sources": {name: _text_report(rows) for name, rows in self._prepared.train.items()},
            **{split: {name: _rows_report(rows) for name, rows in parts.items()} for split, parts in splits.items()},
        }

    def val_texts(self) -> Iterator[str]:
        """The held-out documents, decoded (the very text where the tokenizer is byte-level)."""
        for rows in self._prepared.val.values():
            for tokens in rows.documents():
                yield self.tokenizer.decode(tokens)

    # Steps

    @cached_property
    def order(self) -> Order:
        """Weights count tokens, so a source whose rows are less full gets more rows."""
        train = self._prepared.train
        n_rows = tuple(len(rows) for rows in train.values())
        shares = tuple(
            self.sources[name].weight * len(rows) / rows.rows_cache.meta["inputs"] for name, rows in train.items()
        )
        return Order(n_rows, shares, self.batch_size, self.seed)

    @property
    def tokens_per_step(self) -> float:
        """Labels per optimizer step on average: batch_size * max_length less the padding."""
        shares = np.array(self.order.shares) / sum(self.order.shares)
        per_row = [rows.rows_cache.meta["inputs"] / len(rows) for rows in self._prepared.train.values()]
        return float(self.batch_size * (shares @ per_row))

    def n_steps(self, max_tokens: int | None = None, max_epochs: float | None = None) -> int:
        """Optimizer steps to see at least so many tokens, or so many times the rows that all sources hold together."""
        assert (max_tokens is None) != (max_epochs is None)
        if max_tokens is not None:
            return max(1, math.ceil(max_tokens / self.tokens_per_step))
        return max(1, math.ceil((max_epochs or 0) * sum(self.order.n_rows) / self.batch_size))

    def check_world(self, world_size: int) -> None:
        """Raises ValueError unless `world_size` processes can share a batch evenly, in whole micro-batches."""
        unit = world_size * (self.micro_batch_size or 1)
        if self.batch_size % unit:
            below, above = self.batch_size // unit * unit, -(-self.batch_size // unit) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            micro = "" if self.micro_batch_size is None else f" x data.micro_batch_size={self.micro_batch_size}"
            raise ValueError(
                f"data.batch_size={self.batch_size}: must be a multiple of {world_size} processes{micro} = {unit}; "
                f"the nearest that are: {nearest}"
            )

    def train_dataloader(self) -> DataLoader[Step]:
        """This process's share of every step from `next_batch` to trainer.max_steps (without a trainer: one epoch)."""
        rank, world_size = self._place()
        n_steps = self.n_steps(max_epochs=1) if self.trainer is None else self.trainer.max_steps
        if n_steps < 1:
            raise ValueError(
                f"trainer.max_steps={n_steps}: the data has no end of its own; say how many steps to train"
            )
        steps = TrainSteps(
            list(self._prepared.train.values()),
            self.order,
            (rank, world_size, self.micro_batch_size),
            self.document_mask,
            self.tokenizer.pad_id,
        )
        return self._loader(steps, _From(self.next_batch, n_steps))

    def val_dataloader(self) -> DataLoader[Step] | list[Any]:
        """This process's share of the held-out rows, `batch_size` at a time over all processes; every row once."""
        rank, world_size = self._place()
        if not self._prepared.val:
            return []
        steps = ValSteps(
            list(self._prepared.val.values()),
            self.batch_size,
            (rank, world_size, self.micro_batch_size),
            self.document_mask,
            self.tokenizer.pad_id,
            self.tokenizer.token_bytes,
        )
        return self._loader(steps, _From(0, len(steps)))

    def _place(self) -> tuple[int, int]:
        """Which share of each batch is this process's: the strategy knows, as several processes may have the same."""
        share = (None if self.trainer is None else self.trainer.distributed_sampler_kwargs) or {}
        rank, world_size = share.get("rank", 0), share.get("num_replicas", 1)
        self.check_world(world_size)
        return rank, world_size

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[int]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=None,  # an item is a whole batch
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # a loader draws a seed when it starts: not from the run's own generator
        )

    # Resume

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"next_batch": self.trainer.lightning_module.n_batches, "fingerprint": self.fingerprint} | {
            "settings": self.settings
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the batch after the last one that was consumed; evaluating, there is none to go on with."""
        evaluating = self.trainer is not None and self.trainer.state.fn == "validate"
        if not evaluating:
            self.check_resume(state_dict)
            self.next_batch = state_dict["next_batch"]

    def check_resume(self, state_dict: dict[str, Any]) -> None:
        """Raises DataError when batch N would not hold the same tokens as before."""
        if state_dict["fingerprint"] != self.fingerprint:
            before, now = state_dict["settings"], self.settings
            changed = [
                name if name.startswith("the ") else f"{name} (was {before.get(name)}, is {now[name]})"
                for name in now
                if before.get(name) != now[name]
            ]
            raise DataError(
                f"cannot resume on other data than the checkpoint's: changed {', '.join(changed) or 'format'}; "
                "restore it, or start a new run with init_from="
            )


class TrainSteps(Dataset[Step]):
    """Step N as one process sees it: its slice of the global batch. `place`: rank, world size, rows at once."""

    def __init__(
        self, sources: list[Rows], order: Order, place: tuple[int, int, int | None], document_mask: bool, pad_id: int
    ) -> None:
        self.sources, self.order, self.place = sources, order, place
        self.document_mask, self.pad_id = document_mask, pad_id

    def __getitem__(self, index: int) -> Step:
        rank, world_size, micro_batch_size = self.place
        slots = self.order.batch(index)
        share = len(slots.row) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        arrays = assemble_mixture(self.sources, slots.source[mine], slots.row[mine], self.document_mask, self.pad_id)
        return Step(index, split(to_batch(arrays), micro_batch_size or share))


class ValSteps(Dataset[Step]):
    """The held-out rows in order, so many at a time over all processes that step N has the same rows for any number of
    them. The last step is shorter; a process that has fewer rows left for it than others gets an empty one.
    """

    def __init__(
        self,
        sources: list[Rows],
        batch_size: int,
        place: tuple[int, int, int | None],
        document_mask: bool,
        pad_id: int,
        token_bytes: np.ndarray,
    ) -> None:
        self.sources, self.batch_size, self.place = sources, batch_size, place
        self.document_mask, self.pad_id, self.token_bytes = document_mask, pad_id, token_bytes
        self.ends = np.cumsum([len(rows) for rows in sources])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.batch_size)

    def __getitem__(self, index: int) -> Step:
        rank, world_size, micro_batch_size = self.place
        first = index * self.batch_size
        share = -(-min(self.batch_size, int(self.ends[-1]) - first) // world_size)
        sample = first + rank * share + np.arange(share)
        source = np.searchsorted(self.ends, sample, side="right")
        empty = source == len(self.ends)
        source[empty] = 0
        row = np.where(empty, -1, sample - (self.ends - np.diff(self.ends, prepend=0))[source])
        arrays = assemble_mixture(self.sources, source, row, self.document_mask, self.pad_id)
        arrays["n_bytes"] = label_bytes(arrays["labels"], self.token_bytes)
        return Step(index, split(to_batch(arrays), micro_batch_size or share))


class _From(Sampler[int]):
    """Counts from `first` to `last`; its length is `last`, as the trainer counts the steps of the whole run."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last


def _text_report(rows: Rows) -> dict[str, Any]:
    meta = rows.tokens_cache.meta
    kept = {name: meta[name] for name in ("documents", "empty", "tokens", "bytes")}
    return kept | {"bytes_per_token": round(meta["bytes"] / max(1, meta["tokens"]), 4)}


def _rows_report(rows: Rows) -> dict[str, Any]:
    kept = {name: rows.rows_cache.meta[name] for name in ("documents", "inputs", "rows", "cut")}
    return kept | {"fill": round(rows.rows_cache.meta["fill"], 6)}


def _leave_signals_to_the_run(worker: int) -> None:
    """A cluster signals the whole process group: a worker that dies of it takes an unsaved run along.

    But it dies with its process, whose connections it has inherited: other ranks would take those for alive.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _too_few(name: str, n_documents: int, val_every: int) -> str:
    if n_documents < 2:
        return (
            f"data source {name!r} is one document, so none can be held out; read the paragraphs of a text file with "
            "data=text data.sources.text.path=FILE, name a val_path, or set data.val_every=null"
        )
    return (
        f"data source {name!r} has {n_documents} documents, and every {val_every}th is held out: none for validation; "
        f"set data.val_every to at most {n_documents}, or null"
    )
