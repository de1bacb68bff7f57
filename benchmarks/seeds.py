"""The test accuracy of every trained seed, with mean and standard deviation.

python benchmarks/seeds.py checkpoints/best.pt    test a finished run and add its row
"""

import statistics
from pathlib import Path

import results
from torch import nn

import dataset
import train
from common.files import UserError
from model import load_checkpoint
from training.settings import flag

NOT_IN_COMMAND = ("recipe", "seed", "device", "precision", "threads", *train.MAY_CHANGE_ON_RESUME)


def command_of(config: dict) -> str:
    """The command, without the seed, that trains with these settings of a checkpoint."""
    recipe = config["recipe"]
    standard = vars(results.settings(recipe))
    words = ["python train.py"]
    if recipe != "default":
        words.append(f"--recipe {recipe}")
    for name, default in standard.items():
        value = config.get(name, default)
        if name in NOT_IN_COMMAND or value == default:
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def figures_of(model: nn.Module, data_dir: str) -> results.Row:
    """A trained model's figures on the test split."""
    images, labels = dataset.load(data_dir, train=False)
    logits = train.predict(model, images)
    both = logits.softmax(dim=1) + train.predict(model, images.flip(3)).softmax(dim=1)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        test_accuracy=(logits.argmax(dim=1) == labels).double().mean(),
        flip_accuracy=(both.argmax(dim=1) == labels).double().mean(),
    )


def row_of(path: Path, data_dir: str) -> results.Row:
    """The row of a finished run's checkpoint."""
    model, checkpoint = load_checkpoint(path)
    config, history = checkpoint["train_config"], checkpoint["history"]
    if len(history) != config["epochs"]:
        raise UserError(f"{path} is from an unfinished run: finish it with --resume")
    best = history[checkpoint["epoch"] - 1]
    return dict(
        command=command_of(config),
        seed=config["seed"],
        val_accuracy=best.get("val_accuracy", ""),
        minutes=round(history[-1]["seconds"] / 60, 1),
        machine=checkpoint["environment"],
        **figures_of(model, data_dir),
    )


def spread(rows: results.Rows, name: str) -> str:
    """Mean and standard deviation of a column of fractions, in percent."""
    values = [100 * float(row[name]) for row in rows]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} %"


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default="checkpoints/best.pt")
    rows = results.run(parser, lambda a: [row_of(a.checkpoint, a.data_dir)], ("command", "seed"))
    for command in dict.fromkeys(row["command"] for row in rows):
        seeds = [row for row in rows if row["command"] == command]
        accuracy = spread(seeds, "test_accuracy")
        flipped = spread(seeds, "flip_accuracy")
        print(f"\n- `{command}`, {len(seeds)} seeds: {accuracy}, with flips {flipped}")


if __name__ == "__main__":
    main()
