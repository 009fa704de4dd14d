"""What the user is told: one line per mistake, all of them at once."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

EXIT_CODE = 64  # EX_USAGE of sysexits.h


class ConfigError(ValueError):
    """The configuration does not fit the code. `mistakes` holds one line each: `key: value - rule - remedy`.
    What only a run that has `started` can find is told apart."""

    exit_code = EXIT_CODE

    def __init__(self, mistakes: Sequence[str], *, started: bool = False) -> None:
        self.mistakes = list(dict.fromkeys(mistakes))
        n = len(self.mistakes)
        header = f"{n} mistake{'s' if n > 1 else ''} in the configuration{'' if started else ', nothing was started'}:"
        super().__init__("\n".join([header, *(f"  {mistake}" for mistake in self.mistakes)]))


def refuse(error: ConfigError) -> NoReturn:
    """Print what is wrong and leave with exit code 64.

    At once: nothing has been started that would have to be ended, and unloading Lightning in good order takes 2 s.
    """
    sys.stdout.flush()
    print(error, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def line(key: str, value: str, rule: str, remedy: str = "") -> str:
    """One mistake as it is printed; a part that is empty is left out."""
    text = " - ".join(part for part in (value, rule, remedy) if part)
    return f"{key}: {text}" if text else key


def nearest(word: str, words: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """The right words closest to a misspelt one, best first."""
    return difflib.get_close_matches(word, list(dict.fromkeys(words)), n=n, cutoff=cutoff)


def did_you_mean(words: Sequence[str]) -> str:
    """`did you mean a or b?`, or nothing."""
    return f"did you mean {' or '.join(words)}?" if words else ""
