"""How long a recipe takes from the start of the process to tested weights, and how good these are.

    python benchmarks/time_to_accuracy.py                      --recipe fast, five seeds
    python benchmarks/time_to_accuracy.py --original FOLDER    beside the re-created project

FOLDER is a clone of https://github.com/James-sjt/FashionMnist. It takes 500 of its own steps before
and after each run. It would need 97 epochs at that speed.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import results
import torch
from seeds import spread

from model import load_checkpoint

# Runs in the clone's folder MyModel; prints images per second.
ORIGINAL_LOOP = """
import sys, time
import torch
from torch.utils.data import DataLoader
sys.path.insert(0, "../utils")
from DataLoader import FashionMNIST
from Model import MODEL
model = MODEL(128, 4, 4, 32, 256, False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = DataLoader(FashionMNIST("train", "False", "cpu"), batch_size=2, shuffle=True)
for i, (images, targets) in zip(range(550), batches):
    if i == 50:
        started = time.perf_counter()
    logits = model(images)[0]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    (logits.detach().numpy().argmax(axis=1) == targets.numpy().argmax(axis=1)).sum()
print(1000 / (time.perf_counter() - started))
"""


def original_rate(folder: Path) -> float:
    """Images per second at which the original project trains here."""
    command = [sys.executable, "-c", ORIGINAL_LOOP]
    return float(subprocess.check_output(command, cwd=folder / "MyModel", text=True))


def measure(flags: list[str], data_dir: str) -> results.Row:
    """Train once, in a process of its own, and return what it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(results.ROOT / "train.py"), *flags]
        command += ["--data-dir", data_dir, "--output-dir", folder]
        started = time.perf_counter()
        said = subprocess.check_output(command, text=True)
        seconds = time.perf_counter() - started
        checkpoint = load_checkpoint(Path(folder) / "best.pt")[1]
    history = checkpoint["history"]
    training_seconds = history[-1]["seconds"]
    images = sum(row["images"] for row in history)
    return dict(
        command=" ".join(["python train.py", *flags]),
        test_accuracy=float(re.search(r"test accuracy ([\d.]+)", said)[1]),
        seconds=round(seconds, 1),
        training_seconds=round(training_seconds, 1),
        images_per_second=round(images / training_seconds),
        machine=f"{checkpoint['environment']}, {torch.backends.cpu.get_cpu_capability()}",
    )


def measure_seeds(args: argparse.Namespace) -> Iterator[results.Row]:
    for seed in args.seeds:
        before = original_rate(args.original) if args.original else 0
        row = measure([*args.flags, "--seed", str(seed), "--quiet"], args.data_dir)
        if args.original:
            after = original_rate(args.original)
            seconds = 97 * 60_000 / statistics.mean((before, after))
            row |= dict(original_before=before, original_after=after)
            row["times_faster"] = round(seconds / row["seconds"])
        yield row


def run_of(row: dict[str, str]) -> str:
    """What the seeds have in common."""
    return re.sub(r" --seed \d+", "", f"`{row['command']}` ({row['machine']})")


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=range(5))
    add("--original", type=Path, metavar="FOLDER", help="a clone of the project")
    add("flags", nargs="*", default=["--recipe", "fast"], help="after --")
    rows = results.run(parser, measure_seeds, ("command", "machine"))
    for name in dict.fromkeys(map(run_of, rows)):
        group = [row for row in rows if run_of(row) == name]
        seconds = statistics.mean(float(row["seconds"]) for row in group)
        accuracy = spread(group, "test_accuracy")
        print(f"\n- {name}, {len(group)} seeds: {accuracy} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
