"""Dataclasses of settings, read strictly: unknown names, wrong types and bad ranges are errors.

A configuration is a dataclass of sections, each a dataclass of fields with an annotation,
a default and a string below it that says what it means. A field's range stands in its
annotation: `Annotated[float, Rule(lambda v: v > 0, "above 0")]`.

The command line and YAML files both hand over a setting's value as the text that stands there,
and its field's annotation decides how the text is read: `10` is a number for `optim.max_steps`
and a name for `run.dir`. Readers that guess a value's type before they know its field spoil
both: PyYAML alone reads `3e-4` as a string and `2024` as a number. Python code may also give
values of the field's own type.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import itertools
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

_LONGEST = 80
"""Characters of a value that a message shows."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, and how an error message says so."""

    holds: Callable[[Any], bool]
    words: str


Positive = Annotated[float, Rule(lambda v: v > 0, "above 0")]
NotNegative = Annotated[float, Rule(lambda v: v >= 0, "0 or more")]
Share = Annotated[float, Rule(lambda v: 0 < v <= 1, "in (0, 1]")]
ClosedShare = Annotated[float, Rule(lambda v: 0 <= v <= 1, "in [0, 1]")]
OpenShare = Annotated[float, Rule(lambda v: 0 < v < 1, "between 0 and 1, both excluded")]
Decay = Annotated[float, Rule(lambda v: 0 <= v < 1, "in [0, 1)")]
ShareOrCount = Annotated[
    float, Rule(lambda v: 0 < v <= 1 or v == int(v) > 1, "a share in (0, 1] or a whole number above 1")
]
ShareOrSteps = Annotated[
    float, Rule(lambda v: 0 <= v < 1 or v == int(v) >= 1, "a share in [0, 1) or a whole number")
]
Seed = Annotated[int, Rule(lambda v: 0 <= v < 2**31, "in 0 .. 2**31 - 1")]
AtLeastOne = Annotated[int, Rule(lambda v: v >= 1, "at least 1")]
AtLeastTwo = Annotated[int, Rule(lambda v: v >= 2, "at least 2")]
AtLeast32 = Annotated[int, Rule(lambda v: v >= 32, "at least 32")]
Byte = Annotated[int, Rule(lambda v: 1 <= v <= 255, "in 1 .. 255")]
NotNegativeInt = Annotated[int, Rule(lambda v: v >= 0, "0 or more")]


def from_flat(cls: type[T], values: dict[str, Any]) -> T:
    """A `cls` from `{"section.field": value}`; what is not named keeps its default.

    A value is text, as the command line and YAML give it, or has its field's own type.

    Raises ValueError that names the setting, its value and what is allowed.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in _sections(cls)}
    for name, value in values.items():
        annotation = _annotations(cls).get(name)
        if annotation is None:
            raise ValueError(_unknown(cls, name))
        section, key = name.split(".")
        sections[section][key] = _read(name, value, annotation)
    return cls(**{name: _sections(cls)[name](**given) for name, given in sections.items()})


def to_flat(config: Any) -> dict[str, Any]:
    """`{"section.field": value}` of every setting."""
    return {
        f"{section}.{key}": value
        for section, fields in dataclasses.asdict(config).items()
        for key, value in fields.items()
    }


def describe(cls: type) -> str:
    """Every setting with its type, default and meaning, for `--help`."""
    lines = []
    for section, section_cls in _sections(cls).items():
        lines.append(f"\n{section}: {section_cls.__doc__}")
        docs = _docstrings(section_cls)
        for f in dataclasses.fields(section_cls):
            name = f"{section}.{f.name}"
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            lines.append(f"  --{name}  ({_type_name(_annotations(cls)[name])}; default {default!r})")
            lines.append(f"      {docs[f.name]}")
    return "\n".join(lines)


@cache
def _sections(cls: type) -> dict[str, type]:
    return {f.name: f.default_factory for f in dataclasses.fields(cls)}


@cache
def _annotations(cls: type) -> dict[str, Any]:
    return {
        f"{section}.{name}": annotation
        for section, section_cls in _sections(cls).items()
        for name, annotation in typing.get_type_hints(section_cls, include_extras=True).items()
    }


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field, which Python itself throws away."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def shown(value: Any) -> str:
    """A value for a message: control characters escaped, cut to about 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _unknown(cls: type, name: str) -> str:
    known = list(_annotations(cls))
    near = difflib.get_close_matches(name[:_LONGEST], known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    section = name.split(".")[0]
    siblings = [other for other in known if other.split(".")[0] == section]
    listing = (
        f"settings of {section}: {', '.join(siblings)}"
        if siblings
        else f"sections: {', '.join(_sections(cls))}"
    )
    return f"unknown setting {shown(name)}.{hint} The {listing}; --help lists all with their meaning"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8 and has no null character. Bytes of a command line that are not
    UTF-8, and halves of surrogate pairs, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


class _OutOfRange(ValueError):
    """The value has the right type and breaks the field's rule."""


def _read(name: str, value: Any, annotation: Any) -> Any:
    """The value as the annotated type and within its range, or ValueError."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = _read(name, value, inner[0])
        if not inner[1].holds(value):
            raise _OutOfRange(f"{name} is {shown(value)}; it must be {inner[1].words}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(name, value, annotation)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        near = difflib.get_close_matches(str(value)[:_LONGEST], inner, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(inner)}{hint}")
    if origin is list:
        items = _items(value)
        if items is not None:
            return [_read(name, item, inner[0]) for item in items]
    elif annotation is str and isinstance(value, str):
        if not is_unicode(value):
            raise _OutOfRange(f"{name} is {shown(value)}; it must be Unicode text without a null character")
        return value
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif annotation in (int, float) and (number := _number(value, annotation)) is not None:
        return number
    given = "True, or without a value" if value is True else shown(value)
    raise ValueError(f"{name} is {given}; it must be of type {_type_name(annotation)}")


def _read_union(name: str, value: Any, annotation: Any) -> Any:
    """The value as the first of several types that takes it; `a,b` is a list where a list is allowed."""
    choices = typing.get_args(annotation)
    is_none = value is None or (isinstance(value, str) and value.lower() == "none")
    if is_none and types.NoneType in choices:
        return None
    lists = [choice for choice in choices if typing.get_origin(choice) is list]
    if lists and isinstance(value, str) and ("," in value or value.startswith("[")):
        choices = lists
    for choice in choices:
        try:
            return _read(name, value, choice)
        except _OutOfRange:
            raise
        except ValueError:
            continue
    raise ValueError(f"{name} is {shown(value)}; it must be of type {_type_name(annotation)}")


def _items(value: Any) -> list[Any] | None:
    """The items of a list, also from text: `a,b`, `[a, b]` or `["a", "b"]`. None for what is no list."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return None
    inside = value.strip().removeprefix("[").removesuffix("]")
    return [item.strip().strip("\"'") for item in inside.split(",")] if inside.strip() else []


def _number(value: Any, kind: type) -> float | int | None:
    """A finite number of the kind, also from text such as `1e-3` or `10_000`; None for anything else."""
    if isinstance(value, str):
        for read in (int, float):  # as an int first, because floats round above 2**53
            with contextlib.suppress(ValueError):
                value = read(value)
                break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**1023:
        return None
    if kind is float:
        return float(value)
    return int(value) if value == int(value) and abs(value) < 2**63 else None


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return f"{_type_name(inner[0])}, {inner[1].words}"
    if origin is Literal:
        return " | ".join(inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(choice) for choice in inner)
    if origin is list:
        return f"list of {_type_name(inner[0])}"
    return "none" if annotation is types.NoneType else annotation.__name__
