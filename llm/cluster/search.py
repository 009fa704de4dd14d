"""The fastest settings of a run that fit its machines: micro-batch, checkpointing, strategy and how it shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import OmegaConf

from llm.cluster.plan import device_speed, timed, usable
from llm.cluster.subject import Stated, Subject, subject
from llm.cluster.trace import peak
from llm.command import CONF
from llm.config import ConfigError

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
    """

    changes: Changes
    tokens_per_s: float
    efficiency: float
    memory_bytes: float


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
        for checkpointing in _CHECKPOINTING:
            changes = (*strategy, f"strategy.checkpointing={checkpointing}")
            settings = list(_fitting(planned, changes, stated))
            found += sorted(settings, key=_slowness)[:1]
            if settings and settings[0].changes[-1] == f"data.micro_batch_size={_share(planned, changes, stated)}":
                break  # all rows at once fit already
    return sorted(found, key=_slowness)[:_SHOWN]


def _slowness(setting: Setting) -> tuple[float, float]:
    return -round(setting.tokens_per_s), setting.memory_bytes


def _strategies(planned: Subject) -> Iterator[Changes]:
    """Ways to lay out these processes that train the same numbers."""
    n_nodes = int(planned.cfg.trainer.num_nodes)
    per_node = planned.world_size // n_nodes
    if planned.world_size == 1:
        yield ("strategy=single",)
        return
    if planned.precision != "bf16-true":  # of which only fsdp keeps float32 weights
        yield ("strategy=ddp",)
    yield ("strategy=fsdp",)
    yield ("strategy=fsdp", "strategy.reshard_after_forward=false")
    if n_nodes > 1:
        yield ("strategy=fsdp", f"strategy.replicate_size={n_nodes}")
    for size in (2, 4, 8):
        if per_node % size == 0:
            yield ("strategy=fsdp", f"strategy.tensor_parallel_size={size}")


def _varied(planned: Subject, changes: Changes, stated: Stated) -> Subject | None:
    """The run with these changes; None if its groups do not agree any more."""
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
    try:
        return subject(cfg, stated)
    except ConfigError:
        return None


def _parsed(text: str) -> int | bool | str:
    return int(text) if text.isdecimal() else text == "true" if text in ("true", "false") else text


def _share(planned: Subject, changes: Changes, stated: Stated) -> int:
    """Rows of a step on each process."""
    varied = _varied(planned, (*changes, "data.micro_batch_size=1"), stated)
    return 0 if varied is None else varied.data.batch_size // varied.n_data


def _fitting(planned: Subject, changes: Changes, stated: Stated) -> Iterator[Setting]:
    """Each micro-batch that fits, the largest first: what one takes of memory grows with it, so the largest is found by
    halving, and the others are not looked at again."""
    share = _share(planned, changes, stated)
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    low, high, largest = 0, len(sizes), None
    while low < high:
        middle = high - 1 if largest is None and high == len(sizes) else (low + high) // 2
        varied = _varied(planned, (*changes, f"data.micro_batch_size={sizes[middle]}"), stated)
        if varied is not None and sum(peak(varied.moments)[1].values()) <= (usable(varied) or 0):
            low, largest = middle + 1, varied
        else:
            high = middle
    if largest is None:
        return
    memory = sum(peak(largest.moments)[1].values())
    for n in reversed(sizes[:low]):
        varied = _varied(planned, (*changes, f"data.micro_batch_size={n}"), stated)
        speed = None if varied is None else device_speed(varied, stated)
        if varied is not None and speed is not None:
            time = timed(varied, stated, speed[0])
            tokens_per_s = varied.layout.tokens / time.seconds
            yield Setting((*changes, f"data.micro_batch_size={n}"), tokens_per_s, time.efficiency, memory)
