"""What the benchmarks share; to be imported first, since it finds the project's modules."""

import argparse
import csv
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from common.files import errors_in_one_line
from training.processes import set_threads
from training.settings import choose_settings
from training.settings import make_parser as make_train_parser

ROOT = Path(train.__file__).parent
Row = dict[str, object]
Rows = list[dict[str, str]]  # of a file of figures


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks, for the script of this file."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only print the saved figures")
    parser.add_argument("--output", type=Path, default=Path(script).with_suffix(".csv"))
    parser.add_argument("--data-dir", default="data")
    return parser


def settings(recipe: str = "default", **changes: object) -> SimpleNamespace:
    """The settings of a recipe, some of them changed."""
    given = dict(recipe=recipe, quiet=True, threads=torch.get_num_threads())
    return choose_settings(train.SETTINGS, train.RECIPES, given | changes)


def settings_of(flags: list[str], **others: object) -> SimpleNamespace:
    """The settings that flags of train.py give; `others` are for what they leave out."""
    given = vars(make_train_parser(train.SETTINGS, "").parse_args(flags))
    return settings(**others | given)


# ---- Files of figures ----


def commit() -> str:
    """The commit that the code is at, with a + where a script has changed; "" without git."""
    if not (ROOT / ".git").exists():
        return ""
    git = partial(subprocess.check_output, cwd=ROOT, text=True)
    head = git(["git", "rev-parse", "--short=7", "HEAD"]).strip()
    is_changed = git(["git", "status", "--porcelain", "--", "*.py"])
    return f"{head}+" if is_changed else head


def machine() -> str:
    """What a script computes on, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    name = found[1] if found else platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name}, {instructions}, torch {torch.__version__}, {threads} threads"


def read(path: Path) -> Rows:
    """The rows of a file of figures; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: Row, *key: str) -> None:
    """Add a row, with commit and machine, for those that are alike in columns `key`, if any."""
    row = dict(commit=commit(), machine=machine()) | row
    for name, value in row.items():
        value = value.item() if isinstance(value, torch.Tensor) else value
        row[name] = round(value, 4) if isinstance(value, float) else value

    def is_alike(other: dict[str, str]) -> bool:
        return bool(key) and all(other[name] == str(row[name]) for name in key)

    rows = [other for other in read(path) if not is_alike(other)] + [row]
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---- Tables ----


def run(parser: argparse.ArgumentParser, measure: Callable, key: tuple[str, ...]) -> Rows:
    """Measure, save each row as it comes, print and return the table."""
    args = parser.parse_args()
    if not args.table:
        set_threads()
        before = dict(commit=commit())  # scripts may change meanwhile
        with errors_in_one_line(parser.prog):
            for row in measure(args):
                add(args.output, before | row, *key)
    rows = read(args.output)
    if rows:
        print_table(rows)
    return rows


def print_table(rows: Rows) -> None:
    """Print rows in Markdown, without commit and machine."""
    names = [name for name in rows[0] if name not in ("commit", "machine")]
    print(f"| {' | '.join(names)} |")
    print(f"|---|{'---:|' * (len(names) - 1)}")
    for row in rows:
        cells = [row[name] for name in names]
        print(f"| {' | '.join(cells)} |")
