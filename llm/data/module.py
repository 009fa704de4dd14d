"""TextData: sources in, steps out. What run.py, the trainer and the callbacks see of the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, MinLen
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from llm.data.cache import FORMAT
from llm.data.collate import Settings, Step
from llm.data.example import Symbols
from llm.data.labelling import ExtractSpan, OfLabels
from llm.data.order import Order
from llm.data.parts import AnyRows, Part, Plan, Prepared
from llm.data.prepare import Held, Recipe
from llm.data.report import rows_report, text_report
from llm.data.source import DataError, Files, Row, Source, digest
from llm.data.steps import From, TrainSteps, ValSteps
from llm.data.supervised import Answers, Supervised
from llm.data.task import Masking, NextToken, Task, Widths
from llm.launch import die_with_parent
from llm.signals import deaf
from llm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class TextData(LightningDataModule):
    """Packed rows of text, or of examples made of the rows of a data set.

    `tasks` says what the text becomes: named, mixed by their weights, and all of one family of models; None is next
    tokens. Exactly one of `sources` (named, mixed by their weights) and `path` (files, whose text is in `column`) says
    what to read. Every `val_every`-th document of a source without validation files of its own is held out; None holds
    nothing out. `batch_size` counts the rows of one optimizer step over all processes; each process computes its
    share `micro_batch_size` rows at a time (None: all at once). Rows of an encoder-decoder have
    `max_length` positions for the source and `target_length` for the target (None: what the tasks make of a full
    source). With `document_mask` documents of one row do not see each other.
    """

    def __init__(
        self,
        tokenizer: Recipe,
        sources: Mapping[str, Source] | None = None,
        path: str | list[str] | None = None,
        column: str = "text",
        tasks: Mapping[str, Task] | None = None,
        max_length: Annotated[int, Ge(1)] = 256,
        target_length: Annotated[int, Ge(1)] | None = None,
        batch_size: Annotated[int, Ge(1)] = 64,
        micro_batch_size: Annotated[int, Ge(1)] | None = None,
        val_every: Annotated[int, Ge(2)] | None = 20,
        document_mask: bool = True,
        cache_dir: Annotated[str, MinLen(1)] = "~/.cache/llm-on-lightning",
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
        self.tasks: dict[str, Task] = dict(tasks or {"causal_lm": NextToken()})
        self.family = _family(self.tasks)
        self.recipe = tokenizer
        self.sources: dict[str, Source] = dict(sources or {"files": Files([] if path is None else path, column)})
        self.max_length = max_length
        self.target_length = _target_length(target_length, self.tasks, max_length)
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
        """Build or find the tokenizer, the token files and the rows. Token files whose shares are all there are put
        together of them. Raises DataError; OSError for data.cache_dir."""
        _ = self._prepared

    def prepare_share(self, number: int, of: int) -> bool:
        """Build or find share `number`, counted from 0, of the `of` that the token files are divided into; returns
        whether all are there now, so that `prepare` has no text to tokenise. Raises as it does, and ValueError."""
        return self._plan.share(self.recipe, number, of)

    def stage(self, folder: Path) -> None:
        """Copy what is read to another cache directory."""
        self._prepared.stage(self.cache_dir, folder)

    def prepare_data(self) -> None:
        self.prepare()

    @property
    def _plan(self) -> Plan:
        widths = Widths(self.max_length, self.target_length or 0)
        return Plan(self.sources, self.tasks, widths, self.val_every, self.seed, self.cache_dir)

    @cached_property
    def _prepared(self) -> Prepared:
        return self._plan.prepared(self.recipe)

    @property
    def n_rows(self) -> dict[str, int]:
        """Rows to train on of each source and task, in the order in which they number their rows."""
        return {f"{part.source}/{part.task}": len(rows) for part, rows in self._prepared.train.items()}

    def texts_of(self, sample: int) -> tuple[str, list[str]]:
        """Where a row to train on is from, and its pieces of text (of pairs, the first parts)."""
        for name, rows in zip(self.n_rows, self._prepared.train.values(), strict=True):
            if sample < len(rows):
                return name, [self.tokenizer.decode(tokens) for tokens in rows.pieces(sample)]
            sample -= len(rows)
        raise DataError(f"sample {sample} is beyond the last row: the data is not that of the run")

    @property
    def task_names(self) -> list[str]:
        """What the numbers in a batch's `tasks` stand for."""
        return list(self.tasks)

    @property
    def has_pairs(self) -> bool:
        """Whether batches hold pairs of texts to be judged."""
        return any(isinstance(task, Masking) and task.next_sentence for task in self.tasks.values())

    @property
    def answers(self) -> Answers:
        """What answers are chosen from."""
        found = {task.answers if isinstance(task, Supervised) else "vocabulary" for task in self.tasks.values()}
        assert len(found) == 1, "checked when the tasks were given"
        return found.pop()

    @property
    def labels(self) -> list[str]:
        """Names of the labels of which one is to be chosen, or of a token's two scores for a span; none: of tokens."""
        labelled = [list(task.labels) for task in self.tasks.values() if isinstance(task, ExtractSpan | OfLabels)]
        return max(labelled, key=len, default=[])

    @property
    def n_labels(self) -> int | None:
        """How many labels there are; None: answers are of the vocabulary."""
        return len(self.labels) or None

    @property
    def _ragged(self) -> tuple[str, ...]:
        """Fields with some values for each row."""
        names = {name for task in self.tasks.values() if isinstance(task, Supervised) for name in task.whole_fields}
        names |= {"pair_labels"} if self.has_pairs else set()
        return ("cls_at", *sorted(names)) if names else ()

    @property
    def tells_documents(self) -> bool:
        """Whether batches say which document each token is of: not where a row is one document, and nothing sees the
        padding, as it comes later."""
        return self.document_mask or self.family != "decoder"

    @property
    def tokenizer(self) -> Tokenizer:
        return self._prepared.tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which tokens are in batch N."""
        total = sum(source.weight for source in self.sources.values())
        weights = {name: round(source.weight / total, 9) for name, source in self.sources.items()}
        contents = {
            part.source: (rows.tokens_cache.meta["content"], rows.rows_cache.meta["held"])
            for part, rows in self._prepared.train.items()
        }
        return {
            "the text or tokenizer": digest(FORMAT, contents, self.tokenizer.fingerprint),
            "the source weights": digest(weights),
            "data.tasks": repr(self.tasks),
            "data.max_length": self.max_length,
            "data.target_length": self.target_length,
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
            "target_length": self.target_length,
            "sources": {part.source: text_report(rows) for part, rows in self._prepared.train.items()},
            **{split: self._rows_report(parts) for split, parts in splits.items()},
        }

    def _rows_report(self, parts: dict[Part, AnyRows]) -> dict[str, Any]:
        """By source, and within it by task if there are several."""
        report: dict[str, Any] = {}
        for part, rows in parts.items():
            if len(self.tasks) == 1:
                report[part.source] = rows_report(rows)
            else:
                report.setdefault(part.source, {})[part.task] = rows_report(rows)
        return report

    def held_out(self, *, everything: bool = False) -> Iterator[tuple[Row, str]]:
        """The held-out rows of all sources, or all there are, and where each is; nothing needs to be prepared."""
        for source in self.sources.values():
            if everything:
                yield from source.rows()
                continue
            own = source.validation()
            if own is None and self.val_every is None:
                raise DataError(
                    "data.val_every=null holds nothing out, and the source has no validation of its own; name its "
                    "val_path, val_paths or val_split"
                )
            held = Held() if own is not None else Held(self.val_every, out=True)
            rows = (source if own is None else own).rows()
            yield from (row for number, row in enumerate(rows) if held.has(number))

    def val_texts(self) -> Iterator[str]:
        """The held-out documents, decoded (the very text where the tokenizer is byte-level)."""
        first = next(iter(self.tasks))
        for rows in (rows for part, rows in self._prepared.val.items() if part.task == first):
            for tokens in rows.documents():
                yield self.tokenizer.decode(tokens)

    # Steps

    @cached_property
    def order(self) -> Order:
        """Weights count tokens, so a source whose rows are less full gets more rows."""
        train = self._prepared.train
        shares = tuple(
            self.sources[part.source].weight * self.tasks[part.task].weight * len(rows) / rows.rows_cache.meta["inputs"]
            for part, rows in train.items()
        )
        return Order(tuple(self.n_rows.values()), shares, self.batch_size, self.seed)

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
        place = (*self._place(), self.micro_batch_size)
        n_steps = self.n_steps(max_epochs=1) if self.trainer is None else self.trainer.max_steps
        if n_steps < 1:
            raise ValueError(
                f"trainer.max_steps={n_steps}: the data has no end of its own; say how many steps to train"
            )
        steps = TrainSteps(*self._mixture(self._prepared.train), place, self._settings, self.order)
        return self._loader(steps, From(self.next_batch, n_steps))

    def val_dataloader(self) -> DataLoader[Step] | list[Any]:
        """This process's share of the held-out rows, `batch_size` at a time over all processes; every row once."""
        place = (*self._place(), self.micro_batch_size)
        if not self._prepared.val:
            return []
        token_bytes = self.tokenizer.token_bytes if self.family == "decoder" else None
        steps = ValSteps(*self._mixture(self._prepared.val), place, self._settings, self.batch_size, token_bytes)
        return self._loader(steps, From(0, len(steps)))

    def _mixture(self, parts: dict[Part, AnyRows]) -> tuple[list[AnyRows], np.ndarray]:
        """The parts in order, and the number of the task of each (int64)."""
        names = self.task_names
        return list(parts.values()), np.array([names.index(part.task) for part in parts], np.int64)

    @property
    def _settings(self) -> Settings:
        return Settings(Symbols.of(self.tokenizer), self.document_mask, self.seed, self._ragged, self.tells_documents)

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
        if self.trainer is None or self.trainer.state.fn != "validate":
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


def _family(tasks: Mapping[str, Task]) -> str:
    """Whose rows the tasks make. Raises ValueError for those of several families."""
    answers = {task.answers if isinstance(task, Supervised) else "vocabulary" for task in tasks.values()}
    if len(answers) > 1:
        raise ValueError(
            f"data.tasks: {', '.join(tasks)} have answers of several kinds ({', '.join(sorted(answers))}), which want "
            "several heads; take tasks of one kind"
        )
    families = {name: task.family for name, task in tasks.items()}
    if len(set(families.values())) > 1:
        listed = ", ".join(f"{name} (model.family={family})" for name, family in families.items())
        raise ValueError(f"data.tasks: {listed} are for several families of models; take those of one")
    return next(iter(families.values()))


def _target_length(given: int | None, tasks: Mapping[str, Task], max_length: int) -> int | None:
    """Positions of a row's target; None where rows have none."""
    made = max(task.target_width(max_length) for task in tasks.values())
    if given is not None and not made:
        raise ValueError(f"data.target_length={given}: rows of {', '.join(tasks)} have no target; leave it null")
    return given or made or None


def _leave_signals_to_the_run(worker: int) -> None:
    """A cluster signals the whole process group: a worker that dies of it takes an unsaved run along.

    But it dies with its process, whose connections it has inherited: other ranks would take those for alive.
    """
    die_with_parent()
    deaf()
