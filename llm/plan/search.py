"""The fastest settings of a run that fit its machines: micro-batch, checkpointing, strategy and how it shards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from omegaconf import OmegaConf

from llm.command import CONF
from llm.config import ConfigError
from llm.plan.plan import device_speed, timed, usable
from llm.plan.subject import Stated, Subject, subject
from llm.plan.trace import Moments, peak

_SHOWN = 10
_CHECKPOINTING = ("none", "selective", "full")
Changes = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One that fits.

    Attributes:
        changes: overrides that make it of the run that was planned.
        tokens_per_s: of all devices, by the model of docs/scaling.md.
        efficiency: of the same model.
        memory_bytes: that a process needs.
        n_micro_batches: of a step.
    """

    changes: Changes
    tokens_per_s: float
    efficiency: float
    memory_bytes: float
    n_micro_batches: int


def search(planned: Subject, stated: Stated) -> list[Setting]:
    """The fastest first. Of each strategy and each way of checkpointing the fastest micro-batch is found; where nothing
    has to be computed again, nothing is.

    Raises:
        ConfigError: if nobody knows how fast a device is, or how much memory it has.
    """
    if usable(planned) is None or device_speed(planned, stated) is None:
        raise ConfigError(["--search: of which device? - give --gpu NAME, or cluster.memory and --tokens-per-s N"])
    found: list[Setting] = []
    for strategy in _strategies(planned):
        found += _of_strategy(planned, strategy, stated)
    if not any(setting.changes[1] == "strategy.checkpointing=none" for setting in found):
        for strategy in _tensor_parallel(planned):  # for models of which one row is too much
            found += _of_strategy(planned, strategy, stated)
    return sorted(found, key=_slowness)[:_SHOWN]


def _slowness(setting: Setting) -> tuple[float, float]:
    return -round(setting.tokens_per_s), setting.memory_bytes


def _strategies(planned: Subject) -> Iterator[Changes]:
    """Ways to lay out these processes that train the same numbers."""
    n_nodes = int(planned.cfg.trainer.num_nodes)
    if planned.world_size == 1:
        yield ("strategy=single",)
        return
    if planned.precision != "bf16-true":  # of which only fsdp keeps float32 weights
        yield ("strategy=ddp",)
    yield ("strategy=fsdp",)
    yield ("strategy=fsdp", "strategy.reshard_after_forward=false")
    if n_nodes > 1:
        yield ("strategy=fsdp", f"strategy.replicate_size={n_nodes}")


def _tensor_parallel(planned: Subject) -> Iterator[Changes]:
    """Within a node."""
    per_node = planned.world_size // int(planned.cfg.trainer.num_nodes)
    for size in (2, 4, 8):
        if per_node > 1 and per_node % size == 0:
            yield ("strategy=fsdp", f"strategy.tensor_parallel_size={size}")


def _of_strategy(planned: Subject, strategy: Changes, stated: Stated) -> Iterator[Setting]:
    """The fastest with each way of checkpointing."""
    for checkpointing in _CHECKPOINTING:
        changes = (strategy[0], f"strategy.checkpointing={checkpointing}", *strategy[1:])
        settings = list(_fitting(planned, changes, stated))
        if settings:
            yield min(settings, key=_slowness)
            if settings[-1].n_micro_batches == 1:
                return  # all rows at once fit already


def _varied(planned: Subject, changes: Changes, stated: Stated, n_rows: int) -> Subject | None:
    """The run with these changes and micro-batches; None if its groups do not agree any more."""
    cfg = planned.cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key, _, value in (change.partition("=") for change in changes):
        if key == "strategy":
            node = OmegaConf.load(CONF / "strategy" / f"{value}.yaml")
            kept = {name: cfg.strategy[name] for name in node if name in ("compile", "attention", "float8")}
            cfg.strategy = OmegaConf.merge(node, kept)
            if value == "fsdp" and cfg.strategy.compile == "whole":
                cfg.strategy.compile = "blocks"
        else:
            OmegaConf.update(cfg, key, _parsed(value))
    cfg.data.micro_batch_size = n_rows
    try:
        return subject(cfg, stated)
    except ConfigError:
        return None


def _parsed(text: str) -> int | bool | str:
    return int(text) if text.isdecimal() else text == "true" if text in ("true", "false") else text


def _fitting(planned: Subject, changes: Changes, stated: Stated) -> Iterator[Setting]:
    """Each micro-batch that fits, the smallest first.

    Each moment grows in a straight line with the rows of a micro-batch, so two are traced; and that of all rows, which
    is alone in its step.
    """
    one = _varied(planned, changes, stated, 1)
    speed = None if one is None else device_speed(one, stated)
    if one is None or speed is None:
        return
    share = one.data.batch_size // one.n_data
    two = _varied(planned, changes, stated, 2) if share % 2 == 0 and share > 2 else None
    for n in (n for n in range(1, share + 1) if share % n == 0):
        if n == 1 or (two is not None and n < share):
            memory = max(_line(one.moments, None if two is None else two.moments, moment, n) for moment in one.moments)
        else:
            whole = _varied(planned, changes, stated, n)
            memory = math.inf if whole is None else sum(peak(whole.moments)[1].values())
        if memory <= (usable(one) or 0):
            layout = one.layout
            layout = replace(
                layout,
                n_micro_batches=share // n,
                micro_batch_tokens=n * layout.micro_batch_tokens,
                source_tokens=n * layout.source_tokens,
                scored_tokens=n * (layout.scored_tokens or 0),
            )
            time = timed(one, stated, speed[0], layout)
            made = (*changes, f"data.micro_batch_size={n}")
            yield Setting(made, layout.tokens / time.seconds, time.efficiency, memory, share // n)


def _line(one: Moments, two: Moments | None, moment: str, n: int) -> float:
    """Of n rows, from what one and two need."""
    first = sum(one[moment].values())
    return first if two is None else first + (n - 1) * (sum(two[moment].values()) - first)
