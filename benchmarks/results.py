"""What the benchmarks share: their flags, the file of figures beside each of them, and the table
that they print.

`python benchmarks/NAME.py` measures and writes NAME.csv; with `--table` it prints what that file
holds. To be imported before the project's own modules, which lie in the folder above.
"""

import argparse
import csv
import io
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
from common.files import whole_file
from training.settings import choose_settings

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, object]


# ---- The command line ---------------------------------------------------------------------------


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have; `script` is the `__file__` of one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--table", action="store_true", help="print the saved figures, measure nothing"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(script).with_suffix(".csv"), help="the file of figures"
    )
    parser.add_argument("--data-dir", default="data")
    return parser


def settings(recipe: str = "default", **changes: object) -> SimpleNamespace:
    """The settings of a recipe, some of them changed, with as many threads as there are now."""
    given = dict(recipe=recipe, quiet=True, threads=torch.get_num_threads()) | changes
    return choose_settings(train.SETTINGS, train.RECIPES, given)


# ---- Files of figures ---------------------------------------------------------------------------


def commit() -> str:
    """The commit that the code is at, with a + where a script has changed; "" without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain", "--", "*.py") else ""
        return git("rev-parse", "--short=7", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """The processor, its vector instructions, PyTorch's version and threads, in words."""
    names = [platform.machine()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) or names
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"{names[0]}, {instructions}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file of figures; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Write a file of figures, with every column that one of the rows has."""
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def add(path: Path, row: Row, *key: str) -> None:
    """Add a row to a file, with commit and machine unless it names them.

    It takes the place of a row that is alike in the columns `key`, if any are given.
    """
    row = dict(row)
    row.setdefault("commit", commit())
    row.setdefault("machine", machine())
    rows = read(path)
    for i, other in enumerate(rows):
        if key and all(other[name] == str(row[name]) for name in key):
            rows[i] = row
            break
    else:
        rows.append(row)
    write(path, rows)


# ---- Tables -------------------------------------------------------------------------------------


def cell(value: str, form: str) -> str:
    """A figure in a table; `form` is a format such as ".1%", or "code", or "" for mere text."""
    if not form or not value:
        return value
    return f"`{value}`" if form == "code" else format(float(value), form)


def print_table(
    rows: list[dict[str, str]], columns: dict[str, tuple[str, str]], bold: tuple[str, str] = ()
) -> None:
    """Print rows as a table in Markdown.

    Args:
        columns: of each column, the heading and the format.
        bold: a column's name and a value; the rows that have it are in bold.
    """
    headings = [heading for heading, _ in columns.values()]
    print(f"| {' | '.join(headings)} |")
    print(f"|---|{'---:|' * (len(headings) - 1)}")
    for row in rows:
        cells = [cell(row.get(name) or "", form) for name, (_, form) in columns.items()]
        if bold and row[bold[0]] == bold[1]:
            cells = [f"**{text}**" for text in cells]
        print(f"| {' | '.join(cells)} |")


# ---- Time ---------------------------------------------------------------------------------------


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
