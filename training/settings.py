"""One table of settings, one check of them: for flags, edited defaults and resumed runs alike.

A table has a row for each setting, `name=(default, allowed, meaning)`. `allowed` is a range
(lowest, highest) of numbers, a tuple of words to choose from, or None for anything of the default's
type.
"""

import argparse
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from common.files import UserError

INF = math.inf
Table = dict[str, tuple[Any, Any, str]]


def flag(name: str) -> str:
    """The command line's name of a setting: stem_dims is --stem-dims."""
    return f"--{name.replace('_', '-')}"


def element_type(default: Any, allowed: Any) -> type:
    """The type of a setting's value, or of each value in a row: of its bounds, else its default."""
    values = allowed or (default if isinstance(default, tuple | list) else [default])
    types = [type(value) for value in values if value != INF]
    if float in types:
        return float
    return types[0] if types else str


def allowed_values(kind: type, allowed: Any) -> tuple[str, Callable[[Any], bool]]:
    """In words what a value of this type may be, and whether a given one may."""
    if not allowed:
        return f"a value of type {kind.__name__}", lambda value: True
    if kind is str:
        return f"one of {', '.join(allowed)}", lambda value: value in allowed
    low, high = allowed
    limits = f"of at least {low:,}" if high == INF else f"from {low:,} to {high:,}"
    number = "a whole number" if kind is int else "a number"
    # Neither NaN nor infinity is one.
    return f"{number} {limits}", lambda value: low <= value <= high and value < INF


def check(table: Table, name: str, value: Any) -> None:
    """Refuse a value that its row does not allow; the UserError says what it may be."""
    default, allowed, _ = table[name]
    kind = element_type(default, allowed)
    kinds = (int, float) if kind is float else (kind,)
    what, is_allowed = allowed_values(kind, allowed)
    is_row = isinstance(default, tuple | list)
    is_good = is_row == isinstance(value, tuple | list)
    if is_row and kind is str:
        what = "words in parentheses, with a comma after each"
    elif is_row:
        what = f"{len(default)} values, each {what}"
        is_good = is_good and len(value) == len(default)
    values = value if is_row and is_good else [value]
    if not is_good or not all(type(v) in kinds and is_allowed(v) for v in values):
        raise UserError(f"{flag(name)} {value!r}: give {what}")


def choose_settings(
    table: Table, recipes: dict[str, dict[str, Any]], given: dict[str, Any]
) -> SimpleNamespace:
    """Every setting, checked: the value given, else the recipe's, else the default."""
    settings = {name: default for name, (default, _, _) in table.items()}
    recipe = given.get("recipe", settings["recipe"])
    if recipe not in list(recipes):  # a list takes what cannot be hashed, too
        raise UserError(f"--recipe {recipe}: give one of {', '.join(recipes)}")
    settings |= recipes[recipe] | given
    if unknown := settings.keys() - table.keys():
        raise UserError(f"there is no setting {', '.join(sorted(unknown))}: correct the name")
    for name, value in settings.items():
        check(table, name, value)
        settings[name] = tuple(value) if isinstance(value, list) else value
    return SimpleNamespace(**settings)


def make_parser(table: Table, description: str) -> argparse.ArgumentParser:
    """A parser with a flag for each setting; it returns only the flags that were given."""
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    # It comes without a page of usage.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    for name, (default, allowed, meaning) in table.items():
        kind = element_type(default, allowed)
        options: dict[str, Any] = dict(
            dest=name, help=f"{meaning} (default: {default})".replace("%", "%%")
        )
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            words = "|".join(allowed or ["TEXT"]) if kind is str else ""
            options |= dict(type=kind, metavar={int: "N", float: "X"}.get(kind, words))
            if isinstance(default, tuple | list):
                options["nargs"] = "*" if kind is str else len(default)
        parser.add_argument(flag(name), **options)
    return parser


def resumed_settings(
    table: Table, saved: dict[str, Any], given: dict[str, Any], may_change: tuple[str, ...]
) -> dict[str, Any]:
    """The settings of a run to resume, with those given that may change; others are refused."""
    if other := ", ".join(map(flag, sorted(saved.keys() ^ table.keys()))):
        raise UserError(
            f"the run to resume and train.py differ in their settings, {other}: start a new run"
        )
    for name, value in given.items():
        is_auto = value == "auto" and "auto" in (table[name][1] or ())  # what it came to was saved
        is_auto = is_auto or (name == "threads" and value == 0)
        if name in may_change or value == saved[name] or is_auto:
            continue
        what = f"{flag(name)} {value} differs from the run to resume, which has {saved[name]}"
        raise UserError(f"{what}: leave it out")
    return saved | {name: value for name, value in given.items() if name in may_change}
