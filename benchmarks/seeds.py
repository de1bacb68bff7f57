"""The test accuracy of every trained seed, with mean and spread, from the saved results.

    python benchmarks/seeds.py                              print the table of seeds.csv
    python benchmarks/seeds.py --add checkpoints/best.pt    evaluate a finished run on the test split, save its line

A run that has its line is not evaluated again.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import train
from model import load_checkpoint
from training.processes import set_threads
from training.settings import choose_settings, flag

TABLE = Path(__file__).resolve().parent / "seeds.csv"
NOT_IN_COMMAND = ("recipe", "seed", "device", "precision", "threads", *train.MAY_CHANGE_ON_RESUME)


def command_of(config: dict) -> str:
    """The command, without the seed, that trains with these settings of a checkpoint."""
    standard = vars(choose_settings(train.SETTINGS, train.RECIPES, {"recipe": config["recipe"]}))
    words = ["python train.py"]
    if config["recipe"] != train.SETTINGS["recipe"][0]:
        words += ["--recipe", config["recipe"]]
    for name, value in config.items():
        is_unused = name in ("teacher_weight", "temperature") and not config["teacher"]
        if name in NOT_IN_COMMAND or is_unused or value == standard[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def figures_of(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
    """A trained model's columns of the table, from the test split: uint8 images (N, 1, 28, 28), labels int64 (N,)."""
    logits = train.predict(model, images)
    mirrored = logits.softmax(dim=1) + train.predict(model, images.flip(3)).softmax(dim=1)

    def accuracy(scores: torch.Tensor) -> float:
        return round((scores.argmax(dim=1) == labels).double().mean().item(), 4)

    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        test_accuracy=accuracy(logits),
        mirrored_accuracy=accuracy(mirrored),
        test_loss=round(F.cross_entropy(logits, labels).item(), 4),
    )


def require_new(command: str, seed: int) -> None:
    """End the script if this command and seed have their line in seeds.csv."""
    if (command, str(seed)) in {(row["command"], row["seed"]) for row in read_table()}:
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script}: error: seed {seed} of {command!r} has its line in {TABLE.name} already")


def evaluate(path: Path, images: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
    """One line of the table."""
    model, checkpoint = load_checkpoint(path)
    config, history = checkpoint["train_config"], checkpoint["history"]
    require_new(command_of(config), config["seed"])
    if len(history) != config["epochs"]:
        raise SystemExit(f"seeds.py: error: {path} is from an unfinished run")
    return dict(
        command=command_of(config),
        seed=config["seed"],
        val_accuracy=round(history[checkpoint["epoch"] - 1].get("val_accuracy", math.nan), 4),
        minutes=round(history[-1]["seconds"] / 60, 1),
        environment=checkpoint["environment"],
        **figures_of(model, images, labels),
    )


def read_table() -> list[dict]:
    """The lines of seeds.csv."""
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def save_table(rows: list[dict], path: Path) -> None:
    """Write rows as a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def add_line(row: dict[str, object]) -> list[dict]:
    """Write seeds.csv with one more line; returns all of them."""
    rows = sorted([*read_table(), row], key=lambda row: (row["command"], int(row["seed"])))
    save_table(rows, TABLE)
    return rows


def print_table(rows: list[dict]) -> None:
    """Print a line for each run and, below the seeds of one command, their mean and standard deviation."""
    print("| command | parameters | val accuracy | test accuracy | with mirror image | test loss | minutes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for command, group in itertools.groupby(rows, key=lambda row: row["command"]):
        lines = list(group)
        for row in lines:
            val = float(row["val_accuracy"])
            print(
                f"| `{command} --seed {row['seed']}` | {int(row['parameters']):,} "
                f"| {'' if math.isnan(val) else f'{val:.2%}'} | {float(row['test_accuracy']):.2%} "
                f"| {float(row['mirrored_accuracy']):.2%} | {row['test_loss']} | {row['minutes']} |"
            )
        if len(lines) > 1:
            means = []
            for name in ("test_accuracy", "mirrored_accuracy"):
                values = [100 * float(row[name]) for row in lines]
                means.append(f"**{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %**")
            print(f"| **mean and standard deviation of {len(lines)} seeds** | | | {' | '.join(means)} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, metavar="CHECKPOINT", help="evaluate this run and save its line")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    rows = read_table()
    if args.add:
        set_threads()
        rows = add_line(evaluate(args.add, *dataset.load(args.data_dir, train=False)))
    print_table(rows)


if __name__ == "__main__":
    main()
