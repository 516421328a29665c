"""Checks of arguments that several operations share."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError, listing the choices, if value isn't one of them."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is not one of: {', '.join(choices)}")
