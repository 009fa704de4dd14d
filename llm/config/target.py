"""What a `_target_` names, whether it may be named, and what it takes."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from llm.config.mistake import did_you_mean, nearest

# Written in YAML / where the class must then really live. Lightning is open only where a run has use for it.
_WRITTEN = ("llm", "lightning")
PLUGINS = "hydra_plugins."  # what Hydra wants to see before the name of a launcher or sweeper
_DEFINED = (
    "llm",
    "lightning.pytorch.trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.strategies",
    "lightning.pytorch.accelerators",
    "lightning.fabric.plugins",
)


class TargetError(ValueError):
    """A `_target_` that names nothing, or nothing that may be named."""


class Parameter(NamedTuple):
    """One argument of a target; `hint` is Any where it cannot be resolved."""

    hint: Any
    required: bool
    default: Any


class Signature(NamedTuple):
    """What a target takes by name; `open` where it takes any other name too (**kwargs)."""

    parameters: dict[str, Parameter]
    open: bool


def resolve(path: Any, packages: Sequence[str]) -> Callable[..., Any]:
    """The class or function called `path`. Nothing outside the allowed packages is imported or looked into.

    Raises TargetError: not allowed, not found, not importable, not a class or function.
    """
    if not isinstance(path, str) or not path:
        raise TargetError("must name a class, as in llm.optimizer.AdamW")
    if not _within(path, (*_WRITTEN, *packages)):
        raise TargetError(
            f"is outside {', '.join((*_WRITTEN, *packages))} - packages=[NAME] allows a package of your own"
        )
    if any(part.startswith("_") or not part.isidentifier() for part in path.split(".")):
        raise TargetError("must be a public dotted name")
    found = _find(path, tuple(packages))
    home = getattr(found, "__module__", None)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise TargetError("is no class or function")
    if not isinstance(home, str) or not _within(home, (*_DEFINED, *packages)):
        raise TargetError(f"is defined in {home}, which a configuration may not name")
    if home.startswith("lightning.") and not inspect.isclass(found) and not _within(home, packages):
        raise TargetError("is a function of Lightning; a configuration may name its classes")
    return found


@cache
def signature(target: Callable[..., Any]) -> Signature:
    """The arguments of a class or function, each hint resolved alone: one that fails leaves the others judged."""
    try:
        arguments = inspect.signature(target).parameters.values()
    except ValueError:  # written in C, without a signature
        return Signature({}, open=True)
    named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
    parameters = {a.name: Parameter(_hint(target, a), required=a.default is a.empty, default=a.default) for a in named}
    return Signature(parameters, open=any(a.kind is a.VAR_KEYWORD for a in arguments))


def returned(target: Callable[..., Any]) -> type | None:
    """The class of what calling `target` gives, where it can be told."""
    if inspect.isclass(target):
        return target
    hint = _resolved(getattr(target, "__annotations__", {}).get("return"), _names_of(target))
    return hint if inspect.isclass(hint) and hint is not type(None) else None


def is_ours(target: Any, packages: Sequence[str]) -> bool:
    """Whether building it early is harmless: a frozen dataclass of this package or the user's only holds settings."""
    if not inspect.isclass(target) or not _within(target.__module__, ("llm", *packages)):
        return False
    return dataclasses.is_dataclass(target) and target.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _within(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _find(path: str, packages: Sequence[str]) -> Any:
    parts = path.split(".")
    found: Any = _import(parts[0])
    allowed = (*_WRITTEN, *packages, *_parents(packages))
    for n, part in enumerate(parts[1:], start=1):
        if isinstance(found, types.ModuleType) and not _within(found.__name__, allowed):
            raise TargetError(f"leads into {found.__name__}, which a configuration may not name")
        here = ".".join(parts[:n])
        try:
            with _uncollected():
                found = getattr(found, part)
        except AttributeError:
            if not isinstance(found, types.ModuleType) or not _exists(f"{here}.{part}"):
                close = nearest(part, [name for name in dir(found) if not name.startswith("_")])
                remedy = did_you_mean([f"{here}.{name}" for name in close])
                raise TargetError(f"{here} has no {part}" + (f" - {remedy}" if remedy else "")) from None
            found = _import(f"{here}.{part}")
    return found


def _parents(packages: Sequence[str]) -> Iterator[str]:
    """torch of torch.optim: a package inside another is reached through it."""
    for package in packages:
        yield package.split(".")[0]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import(module: str) -> types.ModuleType:
    try:
        with _uncollected():
            return importlib.import_module(module)
    except ImportError as error:
        raise TargetError(f"cannot be imported: {error}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Importing Lightning makes many objects and no garbage: looking for some takes 0.7 s of 4.2.

    What was imported stays: it is frozen, so that the collections of the training to come pass it over too.
    """
    if not gc.isenabled():
        yield
        return
    n_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
        gc.enable()


def _hint(target: Callable[..., Any], argument: inspect.Parameter) -> Any:
    if argument.annotation is argument.empty:
        return Any
    hint = _resolved(argument.annotation, _names_of(target, argument.name))
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """`annotation` with its strings looked up; Any where a name exists only for type checkers."""
    holder = types.SimpleNamespace(__annotations__={"hint": annotation})
    try:
        return get_type_hints(holder, globalns={**vars(typing), **names}, include_extras=True)["hint"]
    except Exception:  # evaluating a library's annotations can raise anything
        return Any


def _names_of(target: Callable[..., Any], argument: str = "") -> dict[str, Any]:
    """The module in which an argument was annotated: a dataclass inherits fields, a class inherits constructors."""
    if not inspect.isclass(target):
        return getattr(inspect.unwrap(target), "__globals__", {})
    if dataclasses.is_dataclass(target) and "__init__" in vars(target):
        owners = [base for base in target.__mro__ if argument in vars(base).get("__annotations__", {})]
        if owners:
            return vars(sys.modules[owners[0].__module__])
    return getattr(inspect.unwrap(target.__init__), "__globals__", vars(sys.modules[target.__module__]))
