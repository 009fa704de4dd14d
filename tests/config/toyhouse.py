"""Small classes that configurations of the tests name; they stand for the rooms, which import much more."""

from __future__ import annotations

import math  # noqa: F401  (a module inside an allowed one: nothing may be reached through it)
import os  # noqa: F401  (the same)
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Gt, Interval

if TYPE_CHECKING:
    from nowhere import Unknown


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Limits(TypedDict):
    low: int


@dataclass(frozen=True)
class Net:
    dim: Annotated[int, Gt(0)] = 8
    n_heads: Annotated[int, Gt(0)] = 2
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    bias: bool | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.dim % self.n_heads:
            wrong.append(f"model.dim: {self.dim} - must be a multiple of model.n_heads={self.n_heads}")
        if self.dim > 1000:
            wrong.append(f"dim={self.dim} is too wide for a toy")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class Wide(Net):
    """Inherits its fields, and the constructor that dataclass makes knows them by name only."""

    depth: Annotated[int, Gt(0)] = 1


class Schedule:
    def __init__(self, warmup_steps: Annotated[int, Ge(0)] = 0, max_steps: int | None = None) -> None:
        self.warmup_steps, self.max_steps = warmup_steps, max_steps


class Linear(Schedule):
    pass


class Optimizer:
    def __init__(
        self,
        lr: Annotated[float, Gt(0)],
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Schedule | None = None,
        names: Sequence[str] = (),
        sizes: dict[str, int] | None = None,
        colour: Colour = Colour.RED,
        folder: Path | str | None = None,
        hook: Callable[[int], int] | None = None,
        limits: Limits | None = None,
        unknown: Unknown | None = None,
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013  (as libraries write it)
        anything: Any = None,
    ) -> None:
        self.lr, self.betas, self.schedule, self.names = lr, betas, schedule, names


class Open:
    def __init__(self, name: str = "", **rest: Any) -> None:
        self.name, self.rest = name, rest


class Trainer:
    """Takes what the tests need of lightning.Trainer, at none of its cost."""

    def __init__(self, max_steps: int = -1, detect_anomaly: bool = False, **rest: Any) -> None:
        self.max_steps = max_steps


def linear(warmup_steps: int = 0) -> Linear:
    return Linear(warmup_steps)


def unsaid(warmup_steps: int = 0):  # type: ignore[no-untyped-def]
    return Linear(warmup_steps)
