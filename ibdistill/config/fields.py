"""Dataclasses of settings, read strictly: unknown names, wrong types and bad ranges are errors.

A configuration is a dataclass of sections, each a dataclass of fields with an annotation,
a default and a string below it that says what it means. A field's range stands in its
annotation: `Annotated[float, Rule(lambda v: v > 0, "above 0")]`.

Values are checked against the annotation rather than trusted, because the two readers
before us guess: fire turns `1e3` into a float and a flag without a value into True, and
PyYAML reads `3e-4` as a string.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, and how an error message says so."""

    holds: Callable[[Any], bool]
    words: str


def from_flat(cls: type[T], values: dict[str, Any]) -> T:
    """A `cls` from `{"section.field": value}`; what is not named keeps its default.

    Raises ValueError that names the setting, its value and what is allowed.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in _sections(cls)}
    for name, value in values.items():
        annotation = _annotations(cls).get(name)
        if annotation is None:
            raise ValueError(_unknown(cls, name))
        section, key = name.split(".")
        sections[section][key] = _checked(name, value, annotation)
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


def _unknown(cls: type, name: str) -> str:
    known = list(_annotations(cls))
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    section = name.split(".")[0]
    siblings = [other for other in known if other.split(".")[0] == section]
    listing = (
        f"settings of {section}: {', '.join(siblings)}"
        if siblings
        else f"sections: {', '.join(_sections(cls))}"
    )
    return f"unknown setting {name!r}.{hint} The {listing}; --help lists all with their meaning"


def _checked(name: str, value: Any, annotation: Any) -> Any:
    """The value as the annotated type and within its range, or ValueError."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = _checked(name, value, inner[0])
        if not inner[1].holds(value):
            raise ValueError(f"{name} is {value!r}; it must be {inner[1].words}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _checked_union(name, value, annotation)
    if origin is Literal:
        if value in inner and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), inner, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(inner)}{hint}")
    if origin is list and isinstance(value, (list, tuple)):
        return [_checked(name, item, inner[0]) for item in value]
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    if annotation is bool and value in ("true", "false"):  # as YAML writes it; fire knows True and False only
        return value == "true"
    number = _number(value)
    if annotation is float and number is not None:
        return float(number)
    if annotation is int and number is not None and number == int(number):
        return int(number)
    quote = """; quote it twice: '"..."'""" if annotation is str and number is not None else ""
    raise ValueError(
        f"{name} is {value!r}, a {type(value).__name__}; it must be of type {_type_name(annotation)}{quote}"
    )


def _checked_union(name: str, value: Any, annotation: Any) -> Any:
    if types.NoneType in typing.get_args(annotation) and value in (None, "none"):
        return None
    errors = []
    for choice in typing.get_args(annotation):
        try:
            return _checked(name, value, choice)
        except ValueError as error:
            errors.append(str(error))
    # a value of the right type but out of range has the more helpful message
    in_type = [error for error in errors if "must be of type" not in error]
    raise ValueError(
        in_type[0] if in_type else f"{name} is {value!r}; it must be of type {_type_name(annotation)}"
    )


def _number(value: Any) -> float | int | None:
    """A finite number, also from a string as PyYAML leaves `3e-4`; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < float("inf") else None


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
