"""Experiments on the validation split, and the table of all that were made.

    python benchmarks/ablations.py --group "8 epochs" --what "mean pooling" -- --pool mean

Flags of `train.py` come after `--`. Rows of one group are to be compared.
"""

import argparse
import tempfile
from collections.abc import Iterator

import results
import torch

import train
from common.files import UserError, errors_in_one_line
from model import load_checkpoint
from training.settings import make_parser

COLUMNS = dict(
    group=("group", ""),
    what=("what", ""),
    command=("command", "code"),
    val_accuracy=("val accuracy", ".2%"),
    val_loss=("val loss", ""),
    minutes=("minutes", ""),
)


def experiment(args: argparse.Namespace) -> Iterator[results.Row]:
    """The row of a run with these flags; the test split is not looked at."""
    if not (args.group and args.what):
        raise UserError("an experiment needs --group, --what and, after --, its flags")
    given = vars(make_parser(train.SETTINGS, "").parse_args(args.flags))
    commit = results.commit()
    with tempfile.TemporaryDirectory() as folder:
        places = dict(output_dir=folder, data_dir=args.data_dir)
        config = results.settings(**places | dict(threads=0) | given)
        if not config.val_size:
            raise UserError("experiments are compared on validation images: give --val-size")
        checkpoint = load_checkpoint(train.train(config))[1]
    row = checkpoint["history"][-1]
    yield dict(
        group=args.group,
        what=args.what,
        command=" ".join(["python train.py", *args.flags]),
        seeds=config.seed,
        val_accuracy=row["val_accuracy"],
        val_loss=row["val_loss"],
        minutes=round(row["seconds"] / 60, 1),
        machine=f"{checkpoint['environment']}, {torch.backends.cpu.get_cpu_capability()}",
        commit=commit,
    )


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--group", help="the rows that this one is to be compared with")
    parser.add_argument("--what", help="what the experiment changes")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    with errors_in_one_line("ablations.py"):
        results.run(parser, experiment, (), COLUMNS)


if __name__ == "__main__":
    main()
