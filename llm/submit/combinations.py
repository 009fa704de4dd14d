"""The runs that overrides with several values stand for, in the order of `python train.py -m`."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from llm.config.mistake import ConfigError, line


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Each combination as overrides of one run; a single empty one of no override at all.

    Raises:
        ConfigError: naming an override that cannot be read, or an interval, which only a sweeper's plugin can.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ConfigError([line(" ".join(overrides), "", str(error).splitlines()[0])]) from None
    return [list(words) for words in found]
