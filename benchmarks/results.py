"""What the benchmarks share: flags, the file of figures beside each script, and printed tables.

To be imported before the project's own modules, which lie in the folder above.
"""

import argparse
import csv
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from training.processes import set_threads
from training.settings import choose_settings

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, object]
Columns = dict[str, tuple[str, str]]  # of a table: the heading and the format, see `cell`


# ---- The command line ----


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have; `script` is its `__file__`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only print the saved figures")
    parser.add_argument("--output", type=Path, default=Path(script).with_suffix(".csv"))
    parser.add_argument("--data-dir", default="data")
    return parser


def settings(recipe: str = "default", **changes: object) -> SimpleNamespace:
    """The settings of a recipe, some of them changed, with as many threads as there are now."""
    given = dict(recipe=recipe, quiet=True, threads=torch.get_num_threads()) | changes
    return choose_settings(train.SETTINGS, train.RECIPES, given)


# ---- Files of figures ----


def commit() -> str:
    """The commit that the code is at, with a + where a script has changed; "" without git."""
    if not (ROOT / ".git").exists():
        return ""
    said = []
    for words in ("rev-parse --short=7 HEAD", "status --porcelain -- *.py"):
        command = ["git", *words.split()]
        said.append(subprocess.check_output(command, cwd=ROOT, text=True).strip())
    return said[0] + ("+" if said[1] else "")


def machine() -> str:
    """The processor, its vector instructions, PyTorch's version and threads, in words."""
    names = [platform.machine()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) or names
    instructions = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{names[0]}, {instructions}, torch {torch.__version__}, {threads} threads"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file of figures; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: Row, *key: str) -> None:
    """Add a row to a file, its fractions rounded, with commit and machine unless it names them.

    It takes the place of a row that is alike in the columns `key`, if any are given.
    """
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
    """A figure in a table; `form` is a format such as ".1%", or "code", or "" for mere text."""
    if not form or not value:
        return value
    return f"`{value}`" if form == "code" else format(float(value), form)


def run(
    parser: argparse.ArgumentParser, measure: Callable, key: tuple[str, ...], columns: Columns
) -> None:
    """What a benchmark does: measure, save each row as it comes, and print the table."""
    args = parser.parse_args()
    if not args.table:
        set_threads()
        for row in measure(args):
            add(args.output, row, *key)
    print_table(read(args.output), columns)


def print_table(rows: list[dict[str, str]], columns: Columns, bold: tuple[str, str] = ()) -> None:
    """Print rows in Markdown, in bold if they have a value in a column: `bold`."""
    headings = [heading for heading, _ in columns.values()]
    print(f"| {' | '.join(headings)} |")
    print(f"|---|{'---:|' * (len(headings) - 1)}")
    for row in rows:
        cells = [cell(row.get(name) or "", form) for name, (_, form) in columns.items()]
        if bold and row[bold[0]] == bold[1]:
            cells = [f"**{text}**" for text in cells]
        print(f"| {' | '.join(cells)} |")


# ---- Time ----


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each call; they take turns, as the machine's speed drifts."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
