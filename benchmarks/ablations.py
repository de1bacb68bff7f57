"""Experiments on the validation split, and the table of all that were made.

    python benchmarks/ablations.py --group "8 epochs" --what "mean pooling" -- --pool mean

Flags of `train.py` come after `--`. Rows of one group are to be compared.
"""

import argparse
import tempfile
from collections.abc import Iterator

import results

import train
from common.files import UserError
from model import load_checkpoint


def experiment(args: argparse.Namespace) -> Iterator[results.Row]:
    """The row of a run with these flags; the test split is not looked at."""
    if not (args.group and args.what):
        raise UserError("an experiment needs --group, --what and, after --, its flags")
    with tempfile.TemporaryDirectory() as folder:
        places = dict(output_dir=folder, data_dir=args.data_dir)
        config = results.settings_of(args.flags, **places, threads=0)
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
        machine=checkpoint["environment"],
    )


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--group", help="the rows that this one is to be compared with")
    parser.add_argument("--what", help="what the experiment changes")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    results.run(parser, experiment, ())


if __name__ == "__main__":
    main()
