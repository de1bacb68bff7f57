"""The plan for the next record: a mean of 96.0 % over five seeds, below 600,000 parameters.

    python benchmarks/record.py --folder FOLDER --plan        its steps, and how long they take
    python benchmarks/record.py --folder FOLDER --minutes 8   do what is next

A changed plan needs a new folder. Validation losses choose; testing comes last.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import peers
import results
import seeds
import torch

import train
from common.files import errors_in_one_line, whole_file
from training.report import write_history

Steps = dict[str, str]  # flags of train.py, by the step's folder

LONG = "--recipe teacher --epochs 200 --rotate 0 --noise 0"
TEACHERS = dict(
    large=f"{LONG} --embed-dim 448",
    wide_resnet=f"{LONG} --stem-dims 64 128 --stem-blocks 6 6 6 --depth 0 --pool mean",
    as_today="--recipe teacher",
)  # After WRN-40-4 (arXiv 1605.07146)
STUDENTS = [  # a group starts from the best so far
    dict(as_record="", warm="--temperature 2", only_taught="--teacher-weight 1"),
    dict(
        wide_at_7x7="--stem-dims 32 56 --stem-blocks 3 2 1 --embed-dim 112 --num-heads 2",
        deep_at_14x14="--stem-blocks 3 5 0",
    ),
    dict(upright="--rotate 0 --noise 0"),
]
FINAL = "--epochs 250 --teacher teacher_0/best.pt teacher_1/best.pt"
PEER = "final_resnet"
BIG = "--val-size 10000 --compile"
TINY = "--val-size 600 --train-size 600 --epochs 2 --stem-dims 4 8 --stem-blocks 0 1 1"
PACE = 1.9e15  # multiply-adds in a minute of an H200, when steps were CUDA graphs


def config_of(flags: str, **changes: str) -> SimpleNamespace:
    return results.settings_of(flags.split(), **changes)


def history(name: str) -> list[dict]:
    return results.read(Path(name, "history.csv"))


def unfinished(steps: Steps) -> list[str]:
    return [name for name in steps if len(history(name)) < config_of(steps[name]).epochs]


def best_of(steps: Steps) -> str:
    """The lowest validation loss; until all have ended, the first."""
    if unfinished(steps):
        return next(iter(steps))
    return min(steps, key=lambda name: float(history(name)[-1]["val_loss"]))


def make_plan(size: str) -> Steps:
    """All steps in order."""
    steps = {name: f"{flags} {size}" for name, flags in TEACHERS.items()}
    best = best_of(steps)
    teacher = f"{steps[best]} --val-size 0"
    student = f"--recipe record --teacher {best}/last.pt"
    tried = {}
    for group in STUDENTS:
        tried |= {name: f"{student} {flags} {size}" for name, flags in group.items()}
        student = tried[best_of(tried)]
    steps |= tried
    steps |= {f"teacher_{seed}": f"{teacher} --seed {seed}" for seed in (0, 1)}
    final = f"{FINAL} {size} --val-size 0"
    steps |= {f"final_{seed}": f"{student} {final} --seed {seed}" for seed in range(5)}
    return steps | {PEER: final}


def print_plan(steps: Steps) -> None:
    work, minutes = {}, 0
    for name, flags in steps.items():
        config = config_of(flags)
        model = peers.preact_resnet() if name == PEER else train.make_model(config)
        work[name] = peers.multiply_adds(model)
        each = 3 * work[name]  # backwards: twice the work
        each += sum(work[Path(path).parent.name] for path in config.teacher)
        minutes += config.epochs * (60_000 - config.val_size) * each / PACE
        done = len(history(name))
        print(f"to minute {minutes:.0f}: {name}, {done} of {config.epochs} epochs, {flags}")


def train_peer(config: SimpleNamespace) -> None:
    run = peers.start(peers.CUTOUT, **vars(config))
    path = run.folder / "run.pt"
    if path.exists():
        model, optimizer, run.history = torch.load(path)
        run.model.load_state_dict(model)
        run.optimizers[0].load_state_dict(optimizer)
    for epoch in range(len(run.history), config.epochs):
        run.history.append(train.train_epoch(run, epoch))
        state = run.model.state_dict(), run.optimizers[0].state_dict(), run.history
        with whole_file(path) as file:
            torch.save(state, file)
        write_history(run.history, run.folder / "history.csv")


def test(data_dir: str) -> None:
    """Write seeds.csv: the five seeds and the peer."""
    rows = [seeds.row_of(Path(f"final_{seed}/best.pt"), data_dir) for seed in range(5)]
    print(seeds.spread(rows, "test_accuracy"))
    peer = peers.preact_resnet()
    peer.load_state_dict(torch.load(f"{PEER}/run.pt", map_location="cpu")[0])
    rows.append(dict(command=PEER, seed=0, **seeds.figures_of(peer, data_dir)))
    for row in rows:
        results.add(Path("seeds.csv"), row, "command", "seed")


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--minutes", type=int, default=8)
    add("--plan", action="store_true")
    add("--tiny", action="store_true")
    add("--data-dir", type=os.path.abspath, default="data")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    size = TINY if args.tiny else BIG
    if args.plan:
        return print_plan(make_plan(size))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("the minutes are over"))
    signal.alarm(60 * args.minutes)
    with errors_in_one_line("record.py"):
        steps = make_plan(size)
        while left := unfinished(steps):
            name = left[0]
            print(name)
            torch.compiler.reset()  # it compiles few models of a class
            config = config_of(steps[name], output_dir=name, data_dir=args.data_dir)
            if name == PEER:
                train_peer(config)
            else:
                train.train(config, resume=Path(name, "last.pt").exists())
            steps = make_plan(size)  # by the best so far
        test(args.data_dir)


if __name__ == "__main__":
    main()
