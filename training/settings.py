"""One table of settings, one check of them.

A row is `name=(default, allowed, meaning)`. `allowed` is a range (lowest, highest), a tuple of
words to choose from, or None for anything of the default's type.
"""

import argparse
import math
from types import SimpleNamespace
from typing import Any

from common.files import UserError

INF = math.inf
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
Table = dict[str, tuple[Any, Any, str]]


def flag(name: str) -> str:
    """The command line's name of a setting: stem_dims is --stem-dims."""
    return f"--{name.replace('_', '-')}"


def element_type(default: Any, allowed: Any) -> type:
    """The type of a setting's value, or of each value in a tuple."""
    values = allowed or default
    if not isinstance(values, tuple):
        return type(values)
    types = [type(value) for value in values if value != INF]
    if float in types:
        return float
    return types[0] if types else str


def is_allowed(value: Any, kind: type, allowed: Any) -> bool:
    """Whether a row takes this single value."""
    kinds = (float, int) if kind is float else (kind,)
    if type(value) not in kinds:
        return False
    if kind is str:
        return not allowed or value in allowed
    low, high = allowed or (-INF, INF)
    return low <= value <= high and value < INF


def check(table: Table, name: str, value: Any) -> None:
    """Refuse a value that its row does not allow, by a UserError."""
    default, allowed, _ = table[name]
    kind = element_type(default, allowed)
    what = WORDS[kind]
    if kind is str and allowed:
        what = f"one of {', '.join(allowed)}"
    elif allowed and allowed[1] == INF:
        what += f" of at least {allowed[0]:,}"
    elif allowed:
        what += f" from {allowed[0]:,} to {allowed[1]:,}"
    values, is_good = [value], True
    if isinstance(default, tuple):
        what = f"a tuple like {default}, each {what}"
        is_good = isinstance(value, tuple) and (not default or len(value) == len(default))
        values = value if is_good else []
    if not is_good or not all(is_allowed(v, kind, allowed) for v in values):
        raise UserError(f"{flag(name)} {value!r}: give {what}")


def choose_settings(
    table: Table, recipes: dict[str, dict[str, Any]], given: dict[str, Any]
) -> SimpleNamespace:
    """Every setting, checked: given, else the recipe's, else the default."""
    settings = {name: default for name, (default, _, _) in table.items()}
    recipe = given.get("recipe", settings["recipe"])
    if recipe not in recipes:
        raise UserError(f"--recipe {recipe}: give one of {', '.join(recipes)}")
    settings |= recipes[recipe] | given
    if unknown := settings.keys() - table.keys():
        raise UserError(f"there is no setting {', '.join(sorted(unknown))}: correct the name")
    for name, value in settings.items():
        settings[name] = tuple(value) if isinstance(value, list) else value
        check(table, name, settings[name])
    return SimpleNamespace(**settings)


def make_parser(
    table: Table, text: str, groups: dict[str, str] | None = None
) -> argparse.ArgumentParser:
    """A parser with a flag for each setting; it returns only those given.

    The text's first paragraph comes first in --help. `groups` titles the first row of each group.
    """
    description, _, epilog = text.partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    group = parser
    # without the page of usage
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    for name, (default, allowed, meaning) in table.items():
        if groups and name in groups:
            group = parser.add_argument_group(groups[name])
        kind = element_type(default, allowed)
        options: dict[str, Any] = dict(type=kind, metavar=kind.__name__)
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif kind is str and allowed:
            options["metavar"] = "|".join(allowed)
        if isinstance(default, tuple):
            options["nargs"] = len(default) or "*"
        help_text = f"{meaning} (default: {default})".replace("%", "%%")
        group.add_argument(flag(name), help=help_text, **options)
    return parser


def resumed_settings(
    table: Table, saved: dict[str, Any], given: dict[str, Any], may_change: tuple[str, ...]
) -> dict[str, Any]:
    """A run's own settings, and those given that may change."""
    if other := sorted(saved.keys() ^ table.keys()):
        raise UserError(f"the run to resume had other settings ({', '.join(other)}): start anew")
    for name, value in given.items():
        if value != saved[name] and name not in may_change:
            raise UserError(f"the run to resume has {flag(name)} {saved[name]}: leave yours out")
    return saved | given
