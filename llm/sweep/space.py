"""What overrides with several values mean to Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from llm.config.mistake import ConfigError, line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Space:
    """`fixed` overrides, and those from which values are drawn, by key."""

    fixed: list[str]
    swept: dict[str, Override]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Of each key, in Optuna's terms: choices, steps of a range, or an interval that tag(log, …) makes logarithmic
        and int(…) a whole number's.

        Raises:
            ConfigError: naming those that are empty.
        """
        found, mistakes = {}, []
        for key, override in self.swept.items():
            try:
                found[key] = _distribution(override)
            except ValueError as error:
                mistakes.append(line(key, _text(override), str(error)))
        if mistakes:
            raise ConfigError(mistakes)
        return found

    def grid(self) -> list[dict[str, Any]]:
        """Each combination of values once, the last key changing fastest, as Hydra's own sweeper has them.

        Raises:
            ConfigError: naming intervals, which have no values to be gone through.
        """
        remedy = "write range(START, STOP, STEP) or values, or take another hydra.sweeper.sampler"
        rule = "sampler=grid goes through values, and an interval has too many"
        mistakes = [
            line(key, _text(override), rule, remedy)
            for key, override in self.swept.items()
            if override.is_interval_sweep()
        ]
        if mistakes:
            raise ConfigError(mistakes)
        lists = [_values(override) for override in self.swept.values()]
        return [dict(zip(self.swept, values, strict=True)) for values in product(*lists)]

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """Of one job."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.swept)]


def space(overrides: Sequence[Override]) -> Space:
    """What a command line fixes, and what it leaves to be found.

    Raises:
        ConfigError: if that is nothing.
    """
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    swept = {override.get_key_element(): override for override in overrides if override.is_sweep_override()}
    if not swept:
        remedy = "give some, as 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
        raise ConfigError([line("hydra/sweeper", "optuna", "no key has several values or an interval", remedy)])
    return Space(fixed, swept)


def _distribution(override: Override) -> BaseDistribution:
    """Raises ValueError for what has no value in it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    values = _values(override)
    if not values:
        raise ValueError("has no values")
    if isinstance(value, RangeSweep) and "log" not in value.tags and value.step > 0:
        kind = IntDistribution if all(isinstance(one, int) for one in values) else FloatDistribution
        return kind(values[0], values[-1], step=value.step) if len(values) > 1 else CategoricalDistribution(values)
    return CategoricalDistribution(values)


def _values(override: Override) -> list[Any]:
    """What can be gone through: numbers of a range, and choices as they are written."""
    value: Any = override.value()
    return list(value.range()) if isinstance(value, RangeSweep) else list(override.sweep_string_iterator())


def _text(override: Override) -> str:
    return str(override.input_line).partition("=")[2]
