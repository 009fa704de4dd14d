"""What Hydra would refuse, and what the check refuses, in one list before `hydra.main` runs.

Hydra alone stops at its first mistake and exits 1. Here each override is tried alone, and the run that the right ones
make is checked.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, ValueType
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from llm.config.check import find, find_in_plugins
from llm.config.explain import Explainer
from llm.config.mistake import ConfigError, line
from llm.config.target import PLUGINS


def check_overrides(
    argv: Sequence[str],
    config_dir: str | Path,
    config_name: str = "train",
    elsewhere: Callable[[DictConfig], bool] = lambda cfg: False,
) -> DictConfig | None:
    """Raise ConfigError with every mistake of a command line (`sys.argv[1:]`) and of the run that it composes.

    Gives the composed configuration, under -m that of the first job; None where the command line asks Hydra for
    something else (--help, --cfg, --info, completion), which is left to `hydra.main`. `register()` has to come first.
    Of a configuration that will run `elsewhere`, what takes Lightning to judge is left to that process.
    """
    arguments, mistakes = _parsed_flags(argv)
    if _is_for_hydra(arguments):
        return None
    with _hydra_as_it_was():
        try:
            composer = _Composer(arguments, Path(config_dir).resolve(), config_name, elsewhere)
        except HydraException as error:
            raise ConfigError([*mistakes, str(error)]) from None
        return composer.check(mistakes)


def quoted(value: Any) -> str:
    """A value as an override has it: in quotes where Hydra's grammar would read something else."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_./-]+", text) else QuotedString(text, Quote.single).with_quotes()


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of a command line the flags that say where configurations are, each with its value, and those that Hydra has not;
    and the overrides."""
    given, unknown = get_args_parser().parse_known_args(list(argv))
    named = {"--config-path": given.config_path, "--config-name": given.config_name, "--config-dir": given.config_dir}
    flags = [word for flag, value in named.items() if value is not None for word in (flag, value)]
    strange = [text for text in unknown if text.startswith("-")]
    return [*flags, *strange], [*given.overrides, *(text for text in unknown if text not in strange)]


class _Composer:
    """Hydra's own loader over the search path that `hydra.main` will use."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        config_dir: Path,
        config_name: str,
        elsewhere: Callable[[DictConfig], bool],
    ) -> None:
        version.setbase("1.3")
        setup_globals()
        JobRuntime.instance().set("name", config_name)
        self.config_name = arguments.config_name or config_name
        self.elsewhere = elsewhere
        self.loader = ConfigLoaderImpl(_search_path(arguments, config_dir))
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.lines: list[str] = arguments.overrides
        self.multirun = arguments.multirun or any(re.match(r"\+*hydra\.mode=MULTIRUN$", text) for text in self.lines)
        self.searched = [text for text in self.lines if text.startswith("hydra.searchpath=")]
        _, self.repository = self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.searched)
        self.explain = Explainer(self.repository)
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        launcher, sweeper = self.plugins() if self.multirun else ("", "")
        self.numbers = launcher.startswith(f"{PLUGINS}llm.")  # which gives jobs their places
        self.draws = not sweeper.endswith(".BasicSweeper")

    def check(self, mistakes: list[str]) -> DictConfig:
        """The configuration of the first job; every mistake of all jobs is raised."""
        overrides = [parsed for text in self.lines if (parsed := self.parse(text, mistakes)) is not None]
        first: DictConfig | None = None
        run_dirs: list[list[str]] = []
        for variant in self.variants(overrides):
            cfg = self.compose(variant, mistakes)
            run_dirs.append(self.run_dirs(cfg) if self.multirun and not self.numbers else [])
            first = first if first is not None else cfg
        mistakes += _swept_place(overrides) if self.numbers else _shared_run_dir(run_dirs)
        if mistakes:
            raise ConfigError(mistakes)
        assert first is not None, "a command line without sweeps is one variant"
        return first

    def parse(self, text: str, mistakes: list[str]) -> Override | None:
        """One `key=value`; a sweep only under -m."""
        try:
            override = self.parser.parse_override(text)
        except HydraException as error:
            mistakes.append(self.explain.syntax(text, error))
            return None
        override.config_loader = self.loader
        if self.multirun and override.is_interval_sweep() and not self.draws:
            key, value = text.split("=", 1)
            mistakes.append(line(key, value, "values are drawn from it by a sweeper", "add hydra/sweeper=optuna"))
            return None
        if override.is_sweep_override() and not self.multirun:
            key, value = text.split("=", 1)
            choice = override.value_type == ValueType.SIMPLE_CHOICE_SWEEP
            remedy = f"add -m to sweep, or write {key}=[{value}] for a list" if choice else "add -m to sweep"
            mistakes.append(line(key, value, "several values are a sweep", remedy))
            return None
        return override

    def variants(self, overrides: list[Override]) -> Iterator[list[Override]]:
        """Each value of each sweep once, beside the first of the others: that is where a value's own mistakes show."""
        values = [values for override in overrides if (values := self.values(override))]
        yield [options[0] for options in values]
        for n, options in enumerate(values):
            for option in options[1:]:
                yield [option if m == n else others[0] for m, others in enumerate(values)]

    def values(self, override: Override) -> list[Override]:
        """What an override stands for, one by one; of an interval the ends."""
        if not override.is_sweep_override():
            return [override]
        key, value = override.get_key_element(), override.value()
        found = [value.start, value.end] if isinstance(value, IntervalSweep) else override.sweep_string_iterator()
        return [self.parser.parse_override(f"{key}={one}") for one in found]

    def plugins(self) -> tuple[str, str]:
        """Which classes launch and sweep: "" where that cannot be told, which is a mistake that others report."""
        chosen = [text for text in self.lines if re.match(r"hydra/(launcher|sweeper)=", text)]
        try:
            hydra = self.load(chosen).hydra
        except Exception:  # as in `base`
            return "", ""
        return str(OmegaConf.select(hydra, "launcher._target_")), str(OmegaConf.select(hydra, "sweeper._target_"))

    def compose(self, overrides: list[Override], mistakes: list[str]) -> DictConfig:
        """Compose what can be composed, check it, and add the mistakes of both."""
        n_before = len(mistakes)
        groups = [override for override in overrides if self.is_group(override)]
        groups = [override for override in groups if self.fits(mistakes, self.explain.choice(override))]
        cfg, applied = self.base(groups, mistakes)
        for override in overrides:
            if self.is_group(override):
                continue
            before = copy.deepcopy(cfg)
            try:
                ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
                applied.append(str(override.input_line))
            except Exception as error:  # Hydra's own, and OmegaConf's AttributeError below a scalar
                cfg = before
                mistakes.append(self.explain.value(override, cfg, error))
        self.enter(cfg)
        mistakes += find_in_plugins(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        mistakes += find(cfg, applied, found=len(mistakes) > n_before, elsewhere=self.elsewhere)
        return cfg

    def is_group(self, override: Override) -> bool:
        return self.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def fits(self, mistakes: list[str], mistake: str | None) -> bool:
        if mistake is not None:
            mistakes.append(mistake)
        return mistake is None

    def base(self, groups: list[Override], mistakes: list[str]) -> tuple[DictConfig, list[str]]:
        """The configuration that the groups alone make; of groups that cannot be composed, each is named."""
        lines = [str(override.input_line) for override in groups]
        try:
            return self.load(lines), lines
        except Exception as joint:  # what Hydra, OmegaConf and YAML raise has no common base
            good: list[str] = []
            for override in groups:
                try:
                    self.load([str(override.input_line)])
                    good.append(str(override.input_line))
                except Exception as error:
                    mistakes += self.explain.file(error, str(override.input_line))
            if len(good) == len(lines):  # each alone is right, or nothing is
                mistakes += self.explain.file(joint, " ".join(lines) or self.config_name)
                good = []
        try:
            return self.load(good), good
        except Exception as error:
            raise ConfigError([*mistakes, *self.explain.file(error, self.config_name)]) from None

    def load(self, overrides: list[str]) -> DictConfig:
        """Compose; a group that still has to be chosen stays `???`, which is MULTIRUN's way."""
        if tuple(overrides) not in self.composed:
            self.composed[tuple(overrides)] = self.loader.load_configuration(
                self.config_name,
                [*self.searched, *overrides],
                run_mode=RunMode.MULTIRUN,
                validate_sweep_overrides=False,
            )
        return copy.deepcopy(self.composed[tuple(overrides)])

    def enter(self, cfg: DictConfig, number: int = 0) -> None:
        """Let `${hydra:…}` and `${run_id:}` see the job that they would see."""
        cfg = copy.deepcopy(cfg)
        with open_dict(cfg.hydra):
            cfg.hydra.mode = RunMode.MULTIRUN if self.multirun else RunMode.RUN
            if self.multirun:
                cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)

    def run_dirs(self, cfg: DictConfig) -> list[str]:
        """The run directory as job 0 and as job 1 of a sweep."""
        found = []
        for number in (0, 1):
            seen: Any = HydraConfig.get()
            with read_write(seen), open_dict(seen):
                seen.job.num = number
            try:
                found.append(str(OmegaConf.select(cfg, "run_dir")))
            except Exception:  # reported by the check
                return []
        return found


def _swept_place(overrides: list[Override]) -> list[str]:
    """Each job of a sweep is called after the sweep and its own number."""
    return [
        line(
            override.key_or_group,
            str(override.input_line).partition("=")[2],
            "names a sweep, whose jobs are that/0, that/1, …",
            "give one",
        )
        for override in overrides
        if override.key_or_group in ("run_name", "run_dir")
        and (override.is_sweep_override() or "${hydra:job." in str(override.input_line))
    ]


def _shared_run_dir(run_dirs: list[list[str]]) -> list[str]:
    """Two jobs of one sweep in one directory: the second would take the first for itself."""
    if len(run_dirs) < 2 or not all(run_dirs):
        return []
    numbered = all(first != second for first, second in run_dirs)
    if numbered or len({first for first, _ in run_dirs}) == len(run_dirs):
        return []
    rule = "every job of a sweep needs a directory of its own"
    remedy = "leave run_name out, or end it in '/${hydra:job.num}' (in quotes)"
    return [line("run_dir", repr(run_dirs[0][0]), rule, remedy)]


def _parsed_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags and the overrides; what is neither is a mistake."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError([f"command line: {message} - python train.py --hydra-help lists the flags"])

    parser.error = refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_args(list(argv))
    flags = [text for text in unknown if text.startswith("-")]
    written = [flag.lstrip("-") if "=" in flag else f"{flag.lstrip('-')}=…" for flag in flags]
    rule = "no such flag; keys are written without dashes"
    mistakes = [line(flag, "", rule, f"write {right}") for flag, right in zip(flags, written, strict=True)]
    behind = [text for text in unknown if not text.startswith("-")]
    if not flags:  # argparse takes overrides from one place only; behind a wrong flag they are read all the same
        rule = "is cut off from the other overrides by a flag"
        mistakes += [line(text, "", rule, "write flags first") for text in behind]
    arguments.overrides += behind
    return arguments, mistakes


def _is_for_hydra(arguments: argparse.Namespace) -> bool:
    asked = (arguments.help, arguments.hydra_help, arguments.shell_completion, arguments.cfg, arguments.info)
    return any(asked) or arguments.experimental_rerun is not None


def _search_path(arguments: argparse.Namespace, config_dir: Path) -> Any:
    """As hydra.main builds it: --config-path replaces ours, relative to train.py; --config-dir is asked first."""
    if arguments.config_path is not None:
        config_dir = config_dir.parent / arguments.config_path
    if not config_dir.is_dir():
        raise ConfigError([line("--config-path", str(config_dir), "is no directory")])
    search_path = create_config_search_path(str(config_dir))
    if arguments.config_dir is not None:
        extra = os.path.abspath(arguments.config_dir)
        if not os.path.isdir(extra):
            raise ConfigError([line("--config-dir", extra, "is no directory")])
        search_path.prepend(provider="command-line", path=f"file://{extra}", anchor=SearchPathQuery(provider="schema"))
    return search_path


@contextmanager
def _hydra_as_it_was() -> Iterator[None]:
    """hydra.main starts from what it finds: leave no job behind."""
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        yield
    finally:
        instance.cfg = before
