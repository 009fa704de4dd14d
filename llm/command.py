"""What the commands of `python -m llm` share: their parser, and the configuration that train.py would run."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parents[1] / "conf"


class Parser(argparse.ArgumentParser):
    """argparse, with the exit code that a wrong command line has here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(64, f"{self.prog}: {message}\n")


def at_least(least: float, kind: type[int] | type[float] = int, *, most: float = math.inf) -> Callable[[str], float]:
    """Of an option: its text as a number that is not less, not above `most`, and finite."""

    def number(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most or found == math.inf:
            what = "whole number" if kind is int else "number"
            bound = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be a {what}, at least {least}{bound}")
        return found

    return number


# Of a sweep, as argparse and Hydra take it.
_SWEEPS = re.compile(r"-m|--m\w*|\+*hydra\.mode=MULTIRUN")


def compose(
    overrides: Sequence[str], elsewhere: Callable[[DictConfig], bool] = lambda cfg: False, *, sweeps: bool = False
) -> DictConfig:
    """The configuration that train.py would run with these overrides, checked; with `sweeps` perhaps of the first run
    of several.

    Raises:
        ConfigError: with every mistake. What takes Lightning to judge is left out where `elsewhere` is true.
    """
    from llm.config import ConfigError, check_overrides, register

    asked = [text for text in overrides if _SWEEPS.fullmatch(text)]
    if asked and not sweeps:
        raise ConfigError([f"{asked[0]}: sweeps over several runs, and this command is for one - leave it out"])
    register()
    cfg = check_overrides(overrides, CONF, elsewhere=elsewhere)
    if cfg is None:
        raise ConfigError([f"{' '.join(overrides)}: is for train.py - give key=value overrides only"])
    return cfg


def beside(run: Path) -> Path:
    """The directory for what belongs to a run, to one of its checkpoints, or to weights that were averaged or imported:
    NAME.out beside those, as a checkpoint with another file in it is taken for a damaged one."""
    if run.parent.name == "checkpoints":
        return run.parents[1]
    # llm.checkpoint.manifest's name for it; to import that takes torch.
    return run.with_name(f"{run.name}.out") if (run / "MANIFEST.json").is_file() else run
