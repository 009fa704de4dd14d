"""Whether a value that was read from YAML can stand for a type hint: pydantic judges, this module words the answer."""

from __future__ import annotations

import enum
import inspect
import math
import pathlib
import types
from collections import abc
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypeVar, Union, get_args, get_origin, is_typeddict

import annotated_types
from pydantic import ConfigDict, InstanceOf, Strict, TypeAdapter, ValidationError

from llm.config.mistake import did_you_mean, nearest

# Strict: "8" is no number and true is no 1. A 1 is a float all the same; nan and inf are numbers that no setting means.
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


class Built:
    """Stands for the object that a node will build: `isinstance` sees its class, yet nothing is built."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind

    def __call__(self) -> None:
        """Only here because a deferred node (`_partial_: true`) passes where a callable is asked for."""

    def __repr__(self) -> str:
        return f"a {self._kind.__name__}"


class Fault(NamedTuple):
    """What is wrong with a value, or with the item at `where` (`.1`, `.name`) inside it."""

    where: str
    value: Any
    rule: str
    remedy: str


def judge(value: Any, hint: Any) -> list[Fault]:
    """The faults of `value` as a `hint`; none where pydantic cannot express the hint: the code itself will tell."""
    adapter = _adapter(hint)
    if adapter is None:
        return []
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return _faults(value, hint, error)
    except TypeError:  # isinstance() itself refuses the hint, as for a protocol that cannot be checked at run time
        return []
    return []


def shown(value: Any) -> str:
    """A value as it is named in a message: YAML's own words, and not more than a line of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    plain = type(value) is Built or type(value).__module__ == "builtins"
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def wording(hint: Any) -> str:
    """A hint in words: `a number greater than 0`, `'fit' or 'test'`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = " and ".join(filter(None, map(_constraint, hint.__metadata__)))
        return f"{wording(args[0])} {ranges}".strip()
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wording(arg) for arg in args))
    if origin is Literal:
        return " or ".join(shown(arg) for arg in args)
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)}: {', '.join(wording(arg) for arg in args)}"
    if _is_collection(origin):
        return f"a list, each item {wording(args[0])}"
    if origin is not None:
        return _WORDS.get(origin, f"{getattr(origin, '__name__', origin)}")
    if is_typeddict(hint):
        return _WORDS[dict]
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return " or ".join(shown(member.value) for member in hint)
    return _WORDS.get(hint, f"a node that builds a {getattr(hint, '__name__', hint)}")


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return _cached_adapter(hint)
    except TypeError:  # a hint that cannot be hashed
        return _new_adapter(hint)


def _new_adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(_from_yaml(hint), config=_STRICT)
    except Exception:  # a library's hints can make pydantic raise anything
        return None


_cached_adapter = cache(_new_adapter)


def _from_yaml(hint: Any) -> Any:
    """`hint` as YAML meets it: a list for any collection, text for a path, and a node where an object is wanted."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_from_yaml(args[0]), *hint.__metadata__)]
    if origin in (Union, types.UnionType):
        return Union[tuple(_from_yaml(arg) for arg in args)]  # noqa: UP007  (built from a tuple)
    if origin in (tuple, set, frozenset):
        inner = tuple(arg if arg is Ellipsis else _from_yaml(arg) for arg in args)
        return Annotated[origin[inner], Strict(False)]
    if origin in (dict, abc.Mapping, abc.MutableMapping):
        return dict[args[0], _from_yaml(args[1])]  # type: ignore[misc, valid-type]
    if _is_collection(origin):
        return list[_from_yaml(args[0])]  # type: ignore[misc]
    if origin is not None or not inspect.isclass(hint) or isinstance(hint, (NewType, TypeVar)):
        return hint
    if is_typeddict(hint) or hint in (abc.Mapping, abc.MutableMapping):
        return dict[str, Any]
    if hint in (tuple, set, frozenset) or issubclass(hint, (pathlib.PurePath, enum.Enum)):
        return Annotated[hint, Strict(False)]
    if hint in _WORDS or hint in (object, bytes, complex):
        return hint
    return Annotated[hint, InstanceOf()]


def _is_collection(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, abc.Iterable) and not issubclass(origin, abc.Mapping)


def _faults(value: Any, hint: Any, error: ValidationError) -> list[Fault]:
    """One fault per wrong item where the shape of the hint is certain, else one for the whole value."""
    inner = _branch(value, hint)
    faults: list[Fault] = []
    if isinstance(value, (list, dict)) and inner is not None and len(value) > 0:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for position, item in items:
            at = _item_hint(inner, position)
            faults += [f._replace(where=f".{position}{f.where}") for f in judge(item, at)] if at is not None else []
    if faults:
        return faults
    return [Fault("", value, _rule(value, hint, error), _remedy(value, hint))]


def _rule(value: Any, hint: Any, error: ValidationError) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    first = error.errors(include_url=False)[0]
    if first["type"] in ("missing", "too_long", "too_short") or wording(hint) == "":
        return f"must be {wording(hint)}, has {len(value)}"
    return f"must be {wording(hint)}"


def _branch(value: Any, hint: Any) -> Any:
    """The one member of a union that a list or mapping can be meant for; the hint itself where it is no union."""
    if get_origin(hint) is Annotated:
        return _branch(value, get_args(hint)[0])
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    wanted = abc.Mapping if isinstance(value, dict) else abc.Iterable
    fits = [arg for arg in get_args(hint) if inspect.isclass(o := get_origin(arg)) and issubclass(o, wanted)]
    return fits[0] if len(fits) == 1 else None


def _item_hint(hint: Any, position: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and Ellipsis not in args:
        return args[position] if isinstance(position, int) and position < len(args) else None
    if inspect.isclass(origin) and issubclass(origin, abc.Mapping):
        return args[1] if not isinstance(position, int) or args[0] is int else None
    return args[0] if args and _is_collection(origin) and isinstance(position, int) else None


def _constraint(constraint: Any) -> str:
    """A range in words."""
    if isinstance(constraint, annotated_types.GroupedMetadata):
        return " and ".join(filter(None, map(_constraint, constraint)))
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most", "multiple_of": "a multiple of"}
    lengths = {"min_length": "of length at least", "max_length": "of length at most"}
    for name, word in {**words, **lengths}.items():
        if (bound := getattr(constraint, name, None)) is not None:
            return f"{word} {bound}"
    return ""


def _remedy(value: Any, hint: Any) -> str:
    choices = _choices(hint)
    close = nearest(str(value), [str(choice) for choice in choices], cutoff=0.4) if not isinstance(value, bool) else []
    if close:
        return did_you_mean([shown(choice) for choice in choices if str(choice) == close[0]])
    members = _members(hint)
    if isinstance(value, str) and {int, float} & members and _is_number(value):
        return f"write {value} without quotes"
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and int in members:
        return f"write {int(value)}"
    is_list = [m in (list, tuple) or _is_collection(get_origin(m)) for m in members]
    if isinstance(value, (int, float, str)) and any(is_list) and not {int, float, str} & members:
        return f"write a list: [{value}]"
    if isinstance(value, dict) and any(inspect.isclass(m) and m not in _WORDS for m in members):
        return "a node names its class with _target_"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _members(hint: Any) -> set[Any]:
    """The alternatives of a hint, annotations removed."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_members(arg) for arg in get_args(hint)))
    return {hint}


def _choices(hint: Any) -> list[Any]:
    found: list[Any] = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            found += get_args(member)
        elif inspect.isclass(member) and issubclass(member, enum.Enum):
            found += [item.value for item in member]
    return found
