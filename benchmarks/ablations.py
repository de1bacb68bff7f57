"""One experiment on the validation split, and the table of all that were made.

    python benchmarks/ablations.py                                                     print ablations.csv as tables
    python benchmarks/ablations.py --group "8 epochs" --what "mean pooling" -- --epochs 8 --pool mean

The second form trains with the flags of `train.py` after `--`, without looking at the test split, and appends a line to
`ablations.csv`. With an `--output-dir` among the flags, the same command goes on with an interrupted experiment. Lines
of one group share their images and their epochs or time, and are to be compared. The lines whose code is "first drafts"
were measured before the code was kept and cannot be repeated.
"""

import argparse
import csv
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from common.files import errors_in_one_line
from model import load_checkpoint
from training.settings import choose_settings, make_parser, resumed_settings

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "ablations.csv"


def code_version() -> str:
    """The commit the code is at, with a + where a script has changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=7", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


def run(group: str, what: str, flags: list[str]) -> dict[str, object]:
    """Train with the flags and return the experiment's line."""
    given, code = vars(make_parser(train.SETTINGS, "").parse_args(flags)), code_version()
    with tempfile.TemporaryDirectory() as folder:
        config = choose_settings(train.SETTINGS, train.RECIPES, dict(output_dir=folder, quiet=True) | given)
        if not config.val_size:
            raise SystemExit("ablations.py: error: experiments are compared on a validation split: give --val-size")
        last = Path(config.output_dir).expanduser() / "last.pt"
        if resume := last.exists():  # go on, if it is the same experiment
            wanted = {name: value for name, value in vars(config).items() if name != "threads" or value}
            saved = load_checkpoint(last)[1]["train_config"]
            config = SimpleNamespace(**resumed_settings(train.SETTINGS, saved, wanted, train.MAY_CHANGE_ON_RESUME))
        train.train(config, resume)
        checkpoint = load_checkpoint(last)[1]
    row = checkpoint["history"][-1]
    return dict(
        group=group,
        what=what,
        command=" ".join(["python train.py", *flags]),
        seeds=config.seed,
        val_accuracy=round(row["val_accuracy"], 4),
        val_loss=round(row["val_loss"], 4),
        minutes=round(row["seconds"] / 60, 1),
        hardware=f"{checkpoint['environment']}, {torch.backends.cpu.get_cpu_capability()}",
        code=code,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", help="the lines that this one is to be compared with")
    parser.add_argument("--what", help="what the experiment changes")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args()
    with open(TABLE, newline="") as file:
        rows: list[dict] = list(csv.DictReader(file))
    if args.group and args.what:
        with errors_in_one_line("ablations.py"):
            row = run(args.group, args.what, args.flags)
        with open(TABLE, "a", newline="") as file:
            csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n").writerow(row)
        rows.append(row)
    elif args.group or args.what or args.flags:
        parser.error("an experiment needs --group, --what and, after --, its flags")
    for group, lines in itertools.groupby(rows, key=lambda row: row["group"]):
        print(f"\n{group}\n\n| what | command | val accuracy | val loss | minutes |\n|---|---|---:|---:|---:|")
        for row in lines:
            accuracy = f"{float(row['val_accuracy']):.2%}"
            print(f"| {row['what']} | `{row['command']}` | {accuracy} | {row['val_loss']} | {row['minutes']} |")


if __name__ == "__main__":
    main()
