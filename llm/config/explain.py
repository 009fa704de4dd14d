"""Hydra's refusals in our words, with the nearest right key."""

from __future__ import annotations

import re
from typing import Any

import yaml
from hydra._internal.config_repository import IConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from llm.config import habit
from llm.config.check import is_light, keys, packages_of
from llm.config.mistake import did_you_mean, line, nearest
from llm.config.schema import ROOT
from llm.config.target import Signature, TargetError, resolve, signature
from llm.config.value import shown


class Explainer:
    """Words for what went wrong, given the files that could have been meant."""

    def __init__(self, repository: IConfigRepository) -> None:
        self.repository = repository

    def syntax(self, text: str, error: Exception) -> str:
        """An override that Hydra's grammar does not read."""
        if "=" not in text and not text.startswith("~"):
            remedy = f"write {text}=…" if re.match(r"[a-z_+]", text) else "write key=value"
            return line(text, "", "is no key=value", remedy)
        key, _, value = text.partition("=")
        if re.search(r"\s", key):
            return line(text, "", "has a space in its key", f"write {''.join(key.split())}={value.strip()}")
        reason = str(error).strip().splitlines()[0]
        return line(key, value, f"cannot be read ({reason})", f"""quote it: '{key}="{value}"'""")

    def choice(self, override: Override) -> str | None:
        """What is wrong with `group=option`, if anything is."""
        group, value = override.key_or_group, override.value()
        if override.is_delete():
            return None
        options = self.options(group)
        given = value if isinstance(value, list) else [value]
        wrong = [o for o in given if not isinstance(o, str) or not self.repository.config_exists(f"{group}/{o}")]
        if not wrong:
            return None
        if value is None:
            return line(group, "null", "is no choice", f"write ~{group}")
        close = did_you_mean([f"{group}={option}" for option in nearest(str(wrong[0]), options)])
        listed = f"there are {', '.join(options)}" if options else "there are none"
        return line(group, shown(wrong[0]).strip("'"), "no such choice", f"{close} {listed}".strip())

    def options(self, group: str) -> list[str]:
        """The choices of a group, those in folders under it included."""
        found = self.repository.get_group_options(group, ObjectType.CONFIG)
        direct = [name for name in found if not name.startswith("_")]  # parts that others are made of
        folders = self.repository.get_group_options(group, ObjectType.GROUP)
        return [*direct, *(f"{folder}/{name}" for folder in folders for name in self.options(f"{group}/{folder}"))]

    def value(self, override: Override, cfg: DictConfig, error: Exception) -> str:
        """An override that does not fit the composed configuration."""
        key, text = override.key_or_group, str(override.input_line)
        _, _, value = text.partition("=")
        if override.package is not None:
            return line(f"{key}@{override.package}", value, "no such group", did_you_mean(nearest(key, ROOT)))
        present = _present(cfg, key)
        if override.is_add() and present:
            return line(key, value, "is there already", f"write {text.lstrip('+')}")
        if not present:
            return self.unknown(key, cfg, value, override.is_delete())
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, ConfigKeyError) and cause.full_key:
            return self.unknown(str(cause.full_key), cfg, "", override.is_delete())
        return line(key, value, str(cause if str(cause).strip() else error).strip().splitlines()[0])

    def unknown(self, key: str, cfg: DictConfig, value: str, deleted: bool) -> str:
        """A key that does not exist: what it is called here, or the nearest that do."""
        parent, _, last = key.rpartition(".")
        existing = [name for name in keys(cfg) if name in ROOT or not (_refers(cfg, name) or name.endswith("_"))]
        if parent in ("hydra.launcher", "hydra.sweeper"):
            existing = [f"{parent}.{name}" for name in OmegaConf.select(cfg, parent)]
        takes = Signature({}, open=False)
        if not deleted:
            if key in (last, f"trainer.{last}") and last in habit.HABITS and habit.ELSEWHERE.get(last) not in existing:
                return line(key, value, habit.HABITS[last].rule, habit.HABITS[last].remedy)
            if (meant := habit.ELSEWHERE.get(last)) in existing:
                return line(key, value, "no such key", f"did you mean {meant}?")
            if (close := _almost(key, existing)) and not is_light(key):
                return line(key, value, "no such key", did_you_mean(close))
            takes = self.takes(cfg, parent)
            if last in takes.parameters or (takes.open and not nearest(last, takes.parameters, cutoff=0.85)):
                return line(key, value, "is not spelt in YAML", f"write +{key}={value}")
        close = _closest(key, existing, [f"{parent}.{name}" for name in takes.parameters])
        return line(key, value, "no such key", did_you_mean(close))

    def takes(self, cfg: DictConfig, parent: str) -> Signature:
        """What the class of a node takes; nothing where there is no such node."""
        node = OmegaConf.select(cfg, parent) if parent and _present(cfg, parent) else None
        if not isinstance(node, DictConfig) or "_target_" not in node:
            return Signature({}, open=False)
        try:
            return signature(resolve(node["_target_"], packages_of(cfg)))
        except (TargetError, OmegaConfBaseException):
            return Signature({}, open=False)

    def file(self, error: Exception, culprit: str) -> list[str]:
        """A YAML file that does not compose; all root keys that it misspells."""
        text = str(error).strip()
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            return [line(f"{mark.name}:{mark.line + 1}", "", f"is no YAML: {error.problem}")]
        path = re.match(r"In '([^']+)'", text)
        if path and "not in 'Run'" in text:
            loaded = self.repository.load_config(path[1])
            names = list(loaded.config) if loaded is not None and isinstance(loaded.config, DictConfig) else []
            wrong = [str(name) for name in names if name not in (*ROOT, "defaults", "hydra")]
            if wrong:
                return [line(f"{path[1]}.yaml", w, "no such key", did_you_mean(nearest(w, ROOT))) for w in wrong]
        if twice := re.match(r"Multiple values for (\S+)\.", text):
            return [line(twice[1], culprit, "is chosen already", f"write {culprit.lstrip('+')}")]
        parts = [part.strip() for part in text.splitlines() if part.strip()]
        search = next((n for n, part in enumerate(parts) if part.startswith("Config search path")), len(parts))
        return [line(culprit, "", " ".join(parts[:search]))]


def _present(cfg: DictConfig, key: str) -> bool:
    """Whether a key is written, whatever its value."""
    parent, _, last = key.rpartition(".")
    try:
        node: Any = OmegaConf.select(cfg, parent) if parent else cfg
    except OmegaConfBaseException:
        return False
    return isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() and last in list(node)


def _refers(cfg: DictConfig, key: str) -> bool:
    """Whether a key only repeats another one's value, or is Hydra's."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return key.split(".")[0] == "hydra" or OmegaConf.is_interpolation(node, last)


def _almost(key: str, existing: list[str]) -> list[str]:
    """The neighbour that a key is surely misspelt from: no two arguments of the Trainer are more alike than 0.83.

    It answers `trainer.max_stesp` at once, where the Trainer's signature would cost 4 s.
    """
    parent, _, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in existing if name.rpartition(".")[0] == parent}
    return [beside[word] for word in nearest(last, beside, cutoff=0.87)] if parent else []


def _closest(key: str, existing: list[str], arguments: list[str]) -> list[str]:
    """The right keys nearest to a wrong one: the same name elsewhere, a neighbour, then any."""
    parent, _, last = key.rpartition(".")
    if same := [name for name in existing if name.rpartition(".")[2] == last]:
        return same[:3]
    beside = [name for name in existing if name.rpartition(".")[0] == parent]
    if close := nearest(key, [*beside, *arguments]) if parent else nearest(key, beside):
        return close
    if close := nearest(key, existing):
        return close
    by_last = {name.rpartition(".")[2]: name for name in reversed(existing)}
    return [by_last[word] for word in nearest(last, by_last, n=2)]
