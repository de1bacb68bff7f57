"""What the benchmarks share; to be imported first, since it finds the project's modules."""

import argparse
import csv
import platform
import re
import statistics
import subprocess
import sys
import timeit
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from training.processes import set_threads
from training.settings import choose_settings

ROOT = Path(train.__file__).parent
Row = dict[str, object]
Rows = list[dict[str, str]]  # of a file of figures
Columns = dict[str, tuple[str, str]]  # headings and formats, see `cell`


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
    """Add a row, with commit and machine, in the place of one alike in columns `key`, if any."""
    row = dict(commit=commit(), machine=machine()) | row
    row = {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}
    rows = read(path)
    for i, other in enumerate(rows):
        if key and all(other[name] == str(row[name]) for name in key):
            rows[i] = row
            break
    else:
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---- Tables ----


def cell(value: str, form: str) -> str:
    """A figure in a table; `form` is a format such as ".1%", or "code", or "" for text."""
    if not form or not value:
        return value
    return f"`{value}`" if form == "code" else format(float(value), form)


def run(
    parser: argparse.ArgumentParser, measure: Callable, key: tuple[str, ...], columns: Columns
) -> Rows:
    """Measure, save each row as it comes, print and return the table."""
    args = parser.parse_args()
    if not args.table:
        set_threads()
        for row in measure(args):
            add(args.output, row, *key)
    rows = read(args.output)
    print_table(rows, columns)
    return rows


def grouped(rows: Rows, name_of: Callable) -> dict[str, Rows]:
    """The rows under the names that they are given."""
    groups = defaultdict(list)
    for row in rows:
        groups[name_of(row)].append(row)
    return groups


def print_table(rows: Rows, columns: Columns, bold: tuple[str, str] = ()) -> None:
    """Print rows in Markdown; in bold those with a value in a column, `bold`."""
    headings = [heading for heading, _ in columns.values()]
    print(f"| {' | '.join(headings)} |")
    print(f"|---|{'---:|' * (len(headings) - 1)}")
    for row in rows:
        cells = [cell(row.get(name) or "", form) for name, (_, form) in columns.items()]
        if bold and row[bold[0]] == bold[1]:
            cells = [f"**{text}**" for text in cells]
        print(f"| {' | '.join(cells)} |")


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each call; they take turns, as the machine's speed drifts."""
    seconds = defaultdict(list)
    for number in range(rounds + 1):
        for name, call in calls.items():
            took = timeit.timeit(call, number=1)
            if number:  # the first round warms up
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}
