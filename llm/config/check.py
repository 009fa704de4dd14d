"""Every mistake of a composed configuration at once, before anything is built."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from llm.config import habit
from llm.config.mistake import ConfigError, did_you_mean, line, nearest
from llm.config.schema import NODE_DICTS, NODES, ROOT, SCALARS
from llm.config.target import PLUGINS, Parameter, Signature, TargetError, is_ours, resolve, returned, signature
from llm.config.value import Built, judge, shown

_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}
# Rooms that import no torch: their mistakes are answered before Lightning's signatures, which cost 4 s, are looked at.
_LIGHT = ("model", "tokenizer", "optimizer", "schedule", "guard", "cluster", "data.sources")
_RESUME = ("auto", "must", "never")
_TRAINER_KEYS = {*habit.TRAINER, *habit.HABITS, *habit.FIXED}


class Mistake(NamedTuple):
    """One mistake; `source` is the key that a wrong value was referred from, if it was."""

    key: str
    text: str
    source: str = ""


class _UnknownError(Exception):
    """A value that cannot be told yet: its own mistake is reported where it is written."""


def check(cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
    """Raise ConfigError naming every misspelt, missing, mistyped or refused key of `cfg`. Builds and writes nothing.

    `overrides` are the command line's `key=value`: if all of them lie in rooms that need no torch and a mistake is
    found there, the answer comes without importing Lightning.
    """
    if mistakes := find(cfg, overrides):
        raise ConfigError(mistakes)


def find(
    cfg: DictConfig,
    overrides: Sequence[str] | None = None,
    found: bool = False,
    elsewhere: Callable[[DictConfig], bool] = lambda cfg: False,
) -> list[str]:
    """The mistakes that `check` raises; `found` if composing has already found others.

    Where `elsewhere` is true of a configuration that has no mistake so far, it will run in other processes, which look
    at the rest; this one does without Lightning.
    """
    search = _Search(cfg)
    search.root()
    search.trainer()
    search.nodes(light=True)
    light = overrides is not None and all(map(is_light, overrides))
    if not (light if found or search.mistakes else elsewhere(cfg)):
        search.nodes(light=False)
    return search.told()


def find_in_plugins(cfg: DictConfig) -> list[str]:
    """The mistakes in Hydra's launcher and sweeper, where they are ours; `cfg` has its node `hydra`."""
    search = _Search(cfg)
    for key in ("hydra.launcher", "hydra.sweeper"):
        node = OmegaConf.select(search.cfg, key)
        if isinstance(node, DictConfig) and str(node.get("_target_")).startswith(f"{PLUGINS}llm."):
            with read_write(node):
                node["_target_"] = node["_target_"].removeprefix(PLUGINS)
            search.node(key, node)
    return search.told()


def is_light(override: str) -> bool:
    """Whether what an override sets can be judged without Lightning."""
    key = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0].replace("/", ".")
    return key in SCALARS or _in_light_room(key) or key in {f"trainer.{name}" for name in habit.TRAINER}


def _in_light_room(key: str) -> bool:
    return any(key == room or key.startswith(room + ".") for room in _LIGHT)


class _Search:
    """One walk over a configuration."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = copy.deepcopy(cfg)
        OmegaConf.set_struct(self.cfg, False)
        self.mistakes: list[Mistake] = []
        self.packages = packages_of(self.cfg)
        self.built: dict[str, Any] = {}

    def add(self, key: str, value: str, rule: str, remedy: str = "", source: str = "") -> None:
        self.mistakes.append(Mistake(key, line(key, value, rule, remedy), source))

    def told(self) -> list[str]:
        """The mistakes, each where it was made."""
        wrong = {mistake.key for mistake in self.mistakes}
        return list(dict.fromkeys(m.text for m in self.mistakes if not m.source or m.source not in wrong))

    def root(self) -> None:
        """The keys themselves, the scalars, and that each group holds a node."""
        for key in map(str, self.cfg):
            if key not in ROOT:
                self.add(key, _raw(self.cfg, key), "no such key", did_you_mean(nearest(key, ROOT)))
        for key, hint in SCALARS.items():
            if key in list(self.cfg) and (value := self.value_of(self.cfg, key, key)) is not _UNKNOWN:
                self.judge(key, value, hint, self.reference(self.cfg, key))
                if key == "run_dir" and str(value).startswith("~"):
                    self.add(key, shown(value), "only a shell knows whose home that is", "write the path out")
        self.resume()
        for key in NODES:
            if key in list(self.cfg):  # unlike `in` alone, this counts a key whose value is ???
                self.expect_node(self.cfg, key, key, f"choose one: {key}=…")
        for group in NODE_DICTS:
            node = self.cfg.get(group)
            for name in map(str, node) if isinstance(node, DictConfig) else ():
                self.expect_node(node, name, f"{group}.{name}", f"to remove it write ~{group}.{name}")

    def resume(self) -> None:
        value = OmegaConf.select(self.cfg, "resume")
        if isinstance(value, str) and value and value not in _RESUME and not os.path.exists(value):
            close = did_you_mean(nearest(value, _RESUME)) if os.sep not in value else ""
            self.add("resume", shown(value), "must be auto, must, never or a path that exists", close)

    def expect_node(self, parent: DictConfig, name: Any, key: str, remedy: str) -> None:
        if OmegaConf.is_missing(parent, name):
            return self.add(key, "???", "must be set", remedy)
        try:
            node = parent[name]
        except OmegaConfBaseException as error:
            return self.interpolation(parent, name, key, error)
        if not isinstance(node, DictConfig) or node._is_none():
            return self.add(key, shown(node), "must be a node: a mapping with _target_", remedy)
        if "_target_" not in node:
            return self.add(f"{key}._target_", "not set", "names the class to build", remedy)
        return None

    def trainer(self) -> None:
        """Our rules for keys of Lightning's Trainer: none of them needs its signature."""
        node = OmegaConf.select(self.cfg, "trainer") if not OmegaConf.is_missing(self.cfg, "trainer") else None
        if not isinstance(node, DictConfig):
            return
        for name in map(str, node):
            key = f"trainer.{name}"
            if OmegaConf.is_missing(node, name):
                continue
            value = self.value_of(node, name, key, nodes=False, report=name in _TRAINER_KEYS)
            if name in habit.HABITS and value not in habit.HABITS[name].neutral:
                self.add(key, shown(value), habit.HABITS[name].rule, habit.HABITS[name].remedy)
            elif name in habit.NODE_HABITS and (isinstance(value, (str, bool)) or _is_written_empty(node, name)):
                self.add(key, shown(value), "is a group of its own here", habit.NODE_HABITS[name])
            elif name == "precision" and str(value) in habit.PRECISION:
                reason = habit.PRECISION[str(value)]
                self.add(key, shown(value), "must be 'auto' or '32-true' or 'bf16-mixed' or 'bf16-true'", reason)
            elif name in habit.TRAINER and value is not _UNKNOWN:
                self.judge(key, value, habit.TRAINER[name], self.reference(node, name))
        for name, (right, reason) in habit.FIXED.items():
            there = name in list(node)
            if not there or self.value_of(node, name, name, report=False) is not right:
                value, remedy = _raw(node, name) if there else "not set", f"trainer.{name}={shown(right)}"
                self.add(f"trainer.{name}", value, f"must be {shown(right)}: {reason}", f"write {remedy}")
        self.length(node)

    def length(self, node: DictConfig) -> None:
        given = [name for name in habit.LENGTHS if name in list(node) and not OmegaConf.is_missing(node, name)]
        given = [name for name in given if self.value_of(node, name, name, report=False) is not None]
        rule = "exactly one of trainer.max_steps, trainer.max_tokens, trainer.max_epochs says how long the run is"
        if not given:
            self.add("trainer.max_steps", "null", rule, "write trainer.max_steps=1000")
        if len(given) > 1:
            values = ", ".join(f"{name}={node[name]}" for name in given)
            keep = given[-1]
            remedy = " ".join(f"trainer.{name}=null" for name in given if name != keep)
            self.add(f"trainer.{keep}", values, rule, f"write {remedy} beside it")

    def nodes(self, light: bool) -> None:
        """Each node that is written in a light room, or in the others: once, where it stands."""
        for key, node in _walk(self.cfg, ""):
            if _in_light_room(key) == light:
                before = len(self.mistakes)
                self.node(key, node)
                if len(self.mistakes) == before:
                    self.build(key, node)

    def node(self, key: str, node: DictConfig) -> None:
        try:
            target = self.target(node)
        except TargetError as error:
            return self.add(f"{key}._target_", str(node.get("_target_")), str(error))
        if refused := habit.refused_callback(target):
            return self.add(key, node["_target_"], *refused)
        takes = self.signature(key, target)
        for name in node:
            if name not in _HYDRA_KEYS:
                self.argument(key, node, str(name), takes)
        if not node.get("_partial_"):
            for name, parameter in takes.parameters.items():
                if parameter.required and name not in list(node):
                    self.add(f"{key}.{name}", "not set", f"{node['_target_']} requires it", f"write +{key}.{name}=…")
        return None

    def argument(self, key: str, node: DictConfig, name: str, takes: Signature) -> None:
        """One key of a node against the argument it is for."""
        here, parameter = f"{key}.{name}", takes.parameters.get(name)
        if name == "_args_":
            return self.add(here, "", "arguments are given by name", f"it takes {', '.join(takes.parameters)}")
        if parameter is None and key == "trainer" and name in habit.HABITS:
            return None  # answered by `trainer`
        if parameter is None:
            # Beside **kwargs any name is right; one that is nearly a named argument is still more likely misspelt.
            close = nearest(name, takes.parameters, cutoff=0.85 if takes.open else 0.6)
            if takes.open and not close:
                return None
            listed = f"it takes {', '.join(takes.parameters)}" if len(takes.parameters) <= 12 else ""
            meant = did_you_mean([f"{key}.{word}" for word in close]) or listed
            return self.add(here, _raw(node, name), f"{node['_target_']} has no such argument", meant)
        if OmegaConf.is_missing(node, name):
            return self.add(here, "???", "must be set", f"write {here}=…")
        if key == "trainer" and name in _TRAINER_KEYS:
            return None  # judged by `trainer`
        if (value := self.value_of(node, name, here)) is not _UNKNOWN and not _is_default(value, parameter):
            self.judge(here, value, parameter.hint, self.reference(node, name))
        return None

    def judge(self, key: str, value: Any, hint: Any, source: str) -> None:
        for fault in judge(value, hint):
            text = shown(fault.value) + (f" (from {source})" if source else "")
            self.add(key + fault.where, text, fault.rule, fault.remedy, source)

    def build(self, key: str, node: DictConfig) -> None:
        """A settings dataclass checks itself across its keys: build it, and keep what it refuses."""
        target = self.target(node)
        if node.get("_partial_") or not is_ours(target, self.packages):
            return
        values = {
            name: self.value_of(node, name, key, report=False) for name in map(str, node) if name not in _HYDRA_KEYS
        }
        if any(value is _UNKNOWN for value in values.values()) or any(map(_holds_stand_in, values.values())):
            return
        try:
            self.built[key] = target(**values)
        except ValueError as error:
            for text in filter(None, (part.strip() for part in str(error).splitlines())):
                named = re.match(r"[a-z_]+(\.\w+)+", text)
                self.mistakes.append(Mistake(named[0] if named else key, text if named else f"{key}: {text}"))

    def target(self, node: DictConfig) -> Callable[..., Any]:
        try:
            return resolve(node["_target_"], self.packages)
        except OmegaConfBaseException as error:
            raise TargetError(_first_line(error)) from error

    def signature(self, key: str, target: Callable[..., Any]) -> Signature:
        takes = signature(target)
        if key != "trainer":
            return takes
        return takes._replace(parameters={**takes.parameters, "max_tokens": Parameter(Any, False, None)})

    def reference(self, node: DictConfig, name: Any) -> str:
        """The key that a value was taken from: `trainer.max_steps` for `${trainer.max_steps}`."""
        if not OmegaConf.is_interpolation(node, name):
            return ""
        raw = re.fullmatch(r"\$\{([\w.]+)\}", _raw(node, name))
        return raw[1] if raw else ""

    def value_of(self, node: DictConfig, name: Any, key: str, nodes: bool = True, report: bool = True) -> Any:
        """The value of a key as plain data, a stand-in for each node in it; _UNKNOWN if it cannot be told."""
        try:
            return self.plain(node[name], nodes)
        except InterpolationToMissingValueError:
            return _UNKNOWN  # the missing value itself is reported
        except OmegaConfBaseException as error:
            if report:
                self.interpolation(node, name, key, error)
            return _UNKNOWN
        except _UnknownError:
            return _UNKNOWN

    def interpolation(self, node: DictConfig, name: Any, key: str, error: OmegaConfBaseException) -> None:
        """Report `${…}` that leads nowhere, once: where it is written, not where that place is referred to."""
        raw = _raw(node, name)
        wanted = re.search(r"Interpolation key '([\w.]+)' not found", str(error))
        if re.fullmatch(r"\$\{[\w.]+\}", raw) if wanted is None else wanted[1] not in raw:
            return
        close = nearest(wanted[1], keys(self.cfg)) if wanted else []
        rule = f"{wanted[1]} does not exist" if wanted else _first_line(error)
        self.add(key, raw, rule, did_you_mean([f"${{{word}}}" for word in close]))

    def plain(self, value: Any, nodes: bool) -> Any:
        if isinstance(value, ListConfig):
            if any(OmegaConf.is_missing(value, n) for n in range(len(value))):
                raise _UnknownError
            return [self.plain(item, nodes) for item in value]
        if not isinstance(value, DictConfig):
            return value
        if nodes and "_target_" in value:
            return self.stand_in(value)
        if any(OmegaConf.is_missing(value, name) for name in value):
            if nodes:
                raise _UnknownError
            return dict.fromkeys(value)
        return {name: self.plain(value[name], nodes) for name in value}

    def stand_in(self, node: DictConfig) -> Any:
        where = str(node._get_full_key(None))
        if where in self.built:
            return self.built[where]
        try:
            kind = functools.partial if node.get("_partial_") else returned(self.target(node))
        except TargetError as error:
            raise _UnknownError from error
        if kind is None:
            raise _UnknownError
        return Built(kind)


class _Unknown:
    def __repr__(self) -> str:
        return "a value that cannot be resolved"


_UNKNOWN = _Unknown()


def keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted, as it is written on the command line."""
    for name in map(str, cfg):
        yield f"{prefix}{name}"
        written = not OmegaConf.is_interpolation(cfg, name) and not OmegaConf.is_missing(cfg, name)
        if written and isinstance(cfg[name], DictConfig) and not cfg[name]._is_none():
            yield from keys(cfg[name], f"{prefix}{name}.")


def packages_of(cfg: DictConfig) -> tuple[str, ...]:
    """The user's own packages, of which targets may be named; a wrong value of that key allows none."""
    packages = OmegaConf.select(cfg, "packages") if "packages" in cfg else None
    return tuple(name for name in packages if isinstance(name, str)) if isinstance(packages, ListConfig) else ()


def _walk(cfg: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    """Every node where it is written, inner ones first; not where it is referred to."""
    names = list(cfg) if isinstance(cfg, DictConfig) else range(len(cfg))
    for name in names:
        if OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name):
            continue
        inner = cfg[name]
        if isinstance(inner, (DictConfig, ListConfig)) and not inner._is_none():
            yield from _walk(inner, f"{key}.{name}" if key else str(name))
    if isinstance(cfg, DictConfig) and "_target_" in cfg:
        yield key, cfg


def _raw(node: DictConfig, name: Any) -> str:
    """A value as it is written: `${trainer.max_steps}`."""
    written: Any = OmegaConf.to_container(node)
    return str(written[name]) if OmegaConf.is_interpolation(node, name) else shown(written[name])


def _is_written_empty(node: DictConfig, name: str) -> bool:
    """Whether a list was emptied here, instead of following the group that it refers to."""
    return not OmegaConf.is_interpolation(node, name) and node[name] == []


def _is_default(value: Any, parameter: Parameter) -> bool:
    """A default is right by definition, whatever its hint says (`x: int = None`)."""
    return type(value) is type(parameter.default) and value == parameter.default


def _holds_stand_in(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_stand_in, value.values()))
    return any(map(_holds_stand_in, value)) if isinstance(value, list) else type(value) is Built


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
