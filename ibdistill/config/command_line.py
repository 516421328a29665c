"""The command line of every program that takes settings: `RECIPE --section.field value ...`.

Values stay the text that was typed; `fields` reads them. All of these mean the same:
`--optim.lr 1e-3` and `--optim.lr=1e-3`; `--run.export` and `--run.export true`;
`--data.task svamp,cqa` and `--data.task '[svamp, cqa]'`. A value that itself begins with `--`
needs the form with `=`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibdistill.config.fields import is_unicode, shown


@dataclass(frozen=True)
class CommandLine:
    """The parts of a command line."""

    positions: list[str]
    """The arguments without a name, such as the recipe."""
    settings: dict[str, str | bool]
    """`section.field` -> its text, or True where it was given without a value. Names without a point are
    here too, so that the reader of the settings refuses them."""
    options: dict[str, str | bool]
    """Name -> text or True of the program's own options."""
    help: bool
    """Whether `--help` or `-h` is among the arguments."""

    @property
    def first(self) -> str | None:
        """The first argument without a name, if there is one."""
        return self.positions[0] if self.positions else None


def parse(arguments: Sequence[str], *, positions: int = 1, options: Sequence[str] = ()) -> CommandLine:
    """Split a command line. `--local_rank`, which DeepSpeed's launcher adds, is left out.

    Args:
        arguments: `sys.argv[1:]`.
        positions: the largest number of arguments without a name.
        options: names of the program's own options, as `part` for `--part`. A hyphen in a
            name may be typed for an underscore.

    Raises ValueError for a name that is given twice, for more arguments without a name, and for one of these
    that is not UTF-8 (`fields` reads the others).
    """
    unnamed: list[str] = []
    named: dict[str, str | bool] = {}
    rest = list(arguments)
    asks_for_help = False
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            asks_for_help = True
        elif not argument.startswith("--"):
            if not is_unicode(argument):
                raise ValueError(f"{shown(argument)} is no text in UTF-8; write it in that encoding")
            unnamed.append(argument)
        else:
            name, equals, text = argument[2:].partition("=")
            name = name.replace("-", "_")
            value: str | bool = text
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else True
            if name in named:
                values = f"{shown(named[name])} and {shown(value)}"
                raise ValueError(f"{shown(name)} is given twice, as {values}; give it once")
            named[name] = value
    named.pop("local_rank", None)
    if len(unnamed) > positions and not asks_for_help:
        raise ValueError(
            f"unexpected arguments {shown(tuple(unnamed[positions:]))}; settings are given as "
            "--section.field value"
        )
    own = {name: named.pop(name) for name in options if name in named}
    return CommandLine(unnamed, named, own, asks_for_help)
