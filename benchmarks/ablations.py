"""Experiments on the validation split, and the table of all that were made.

    python benchmarks/ablations.py --group "8 epochs" --what "mean pooling" -- --pool mean

The first trains with the flags of `train.py` after `--` and adds a row, without looking at the test
split. Rows of one group are to be compared. A row can be repeated at its commit.
"""

import itertools
import tempfile

import results
import torch

import train
from common.files import UserError, errors_in_one_line
from model import load_checkpoint
from training.settings import choose_settings, make_parser

COLUMNS = dict(
    what=("what", ""),
    command=("command", "code"),
    val_accuracy=("val accuracy", ".2%"),
    val_loss=("val loss", ""),
    minutes=("minutes", ""),
)


def experiment(flags: list[str], data_dir: str) -> results.Row:
    """Train with the flags and return the experiment's figures."""
    given = vars(make_parser(train.SETTINGS, "").parse_args(flags))
    commit = results.commit()
    with tempfile.TemporaryDirectory() as folder:
        given = dict(output_dir=folder, data_dir=data_dir, quiet=True) | given
        config = choose_settings(train.SETTINGS, train.RECIPES, given)
        if not config.val_size:
            raise UserError("experiments are compared on validation images: give --val-size")
        best = train.train(config)
        checkpoint = load_checkpoint(best)[1]
    row = checkpoint["history"][-1]
    return dict(
        command=" ".join(["python train.py", *flags]),
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
    args = parser.parse_args()
    if not args.table:
        if not (args.group and args.what):
            parser.error("an experiment needs --group, --what and, after --, its flags")
        with errors_in_one_line("ablations.py"):
            row = experiment(args.flags, args.data_dir)
        results.add(args.output, dict(group=args.group, what=args.what) | row)
    for group, rows in itertools.groupby(results.read(args.output), key=lambda row: row["group"]):
        print(f"\n{group}\n")
        results.print_table(list(rows), COLUMNS)


if __name__ == "__main__":
    main()
