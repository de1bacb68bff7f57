"""The test accuracy of every trained seed, with mean and spread, from the saved results.

    python benchmarks/seeds.py                              print the table of seeds.csv
    python benchmarks/seeds.py --add checkpoints/best.pt    evaluate a finished run on the test split, save its line

A run that has its line is not evaluated again.
"""

import argparse
import csv
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import train
from model import load_checkpoint

TABLE = Path(__file__).resolve().parent / "seeds.csv"
NOT_IN_COMMAND = ("seed", "device", "precision", *train.NOT_OF_THE_RUN)


def command_of(config: dict) -> str:
    """The command, without the seed, that trains with this configuration."""
    standard = train.choose_settings({"recipe": config["recipe"]})
    words = ["python train.py"]
    for name, value in config.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "recipe":
            words += [] if value == train.DEFAULTS["recipe"][0] else [flag, value]
        elif name in ("teacher_weight", "temperature") and not config["teacher"]:
            continue
        elif name not in NOT_IN_COMMAND and value != standard[name]:
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def evaluate(path: Path, images: torch.Tensor, labels: torch.Tensor, known: set[tuple[str, str]]) -> dict[str, object]:
    """One line of the table, for a run that is none of those whose command and seed are `known`."""
    model, checkpoint = load_checkpoint(path)
    config = checkpoint["train_config"]
    if (command_of(config), str(config["seed"])) in known:
        raise SystemExit(f"seeds.py: error: seed {config['seed']} of {command_of(config)!r} has its line already")
    if checkpoint["history"][-1]["epoch"] != config["epochs"]:
        raise SystemExit(f"seeds.py: error: {path} is of a run that is not over")
    logits = train.predict(model, images)
    mirrored = logits.softmax(dim=1) + train.predict(model, images.flip(3)).softmax(dim=1)

    def accuracy(scores: torch.Tensor) -> float:
        return round((scores.argmax(dim=1) == labels).double().mean().item(), 4)

    return dict(
        command=command_of(config),
        seed=config["seed"],
        parameters=model.num_parameters(),
        val_accuracy=round(checkpoint["val_accuracy"], 4),
        test_accuracy=accuracy(logits),
        mirrored_accuracy=accuracy(mirrored),
        test_loss=round(F.cross_entropy(logits, labels).item(), 4),
        minutes=round(checkpoint["history"][-1]["seconds"] / 60, 1),
        environment=checkpoint["environment"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, metavar="CHECKPOINT", help="evaluate this run and save its line")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    rows: list[dict] = []
    if TABLE.exists():
        with open(TABLE, newline="") as file:
            rows = list(csv.DictReader(file))
    if args.add:
        known = {(row["command"], row["seed"]) for row in rows}
        row = evaluate(args.add, *dataset.load(args.data_dir, train=False), known)
        rows = sorted([*rows, row], key=lambda row: (row["command"], int(row["seed"])))
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("| command | parameters | val accuracy | test accuracy | with mirror image | test loss | minutes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for command, group in itertools.groupby(rows, key=lambda row: row["command"]):
        lines = list(group)
        for row in lines:
            val = float(row["val_accuracy"])
            print(
                f"| `{command} --seed {row['seed']}` | {int(row['parameters']):,} "
                f"| {'' if val != val else f'{val:.2%}'} | {float(row['test_accuracy']):.2%} "
                f"| {float(row['mirrored_accuracy']):.2%} | {row['test_loss']} | {row['minutes']} |"
            )
        if len(lines) > 1:
            means = [
                f"**{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f} %**"
                for name in ("test_accuracy", "mirrored_accuracy")
                for values in [[float(row[name]) for row in lines]]
            ]
            print(f"| **mean and standard deviation of {len(lines)} seeds** | | | {' | '.join(means)} | | |")


if __name__ == "__main__":
    main()
