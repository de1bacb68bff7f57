"""How long a recipe takes from the start of the process to tested weights, and how good these are.

    python benchmarks/time_to_accuracy.py                      --recipe fast, five seeds
    python benchmarks/time_to_accuracy.py --original FOLDER    beside the re-created project

FOLDER is a clone of https://github.com/James-sjt/FashionMnist. Its own model and data loader, with
its batch size of 2, take 500 steps before and after each run. All 97 epochs are counted at that
speed, since its 93.1 % are those of its best epoch on the test split, the 97th.
"""

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import results
import torch
from seeds import spread

from model import load_checkpoint
from training.processes import set_threads

ORIGINAL_EPOCHS = 97
COLUMNS = dict(
    command=("command", "code"),
    test_accuracy=("test accuracy", ".2%"),
    seconds=("seconds in all", ".1f"),
    training_seconds=("training", ".1f"),
    images_per_second=("images/s", ".0f"),
    peak_megabytes=("MB", ".0f"),
    times_faster=("times faster", ".0f"),
)
# Runs in the clone's folder MyModel; prints images per second of the original's own training step.
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
for i, (images, targets) in enumerate(batches):
    if i == 50:
        started = time.perf_counter()
    if i == 550:
        break
    logits = model(images)[0]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.item()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    (logits.detach().numpy().argmax(axis=1) == targets.numpy().argmax(axis=1)).sum()
print(1000 / (time.perf_counter() - started))
"""


def original_rate(folder: Path) -> float:
    """Images per second at which the original project trains on this machine."""
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
        model, checkpoint = load_checkpoint(Path(folder) / "best.pt")
    history = checkpoint["history"]
    images_per_second = sum(row["images"] for row in history) / history[-1]["seconds"]
    return dict(
        command=shlex.join(["python", "train.py", *flags]),
        test_accuracy=float(re.search(r"test accuracy ([\d.]+)", said)[1]),
        seconds=round(seconds, 1),
        training_seconds=round(history[-1]["seconds"], 1),
        images_per_second=round(images_per_second),
        parameters=model.num_parameters(),
        machine=f"{checkpoint['environment']}, {torch.backends.cpu.get_cpu_capability()}",
    )


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--original", type=Path, metavar="FOLDER", help="a clone of the project")
    parser.add_argument("flags", nargs="*", default=["--recipe", "fast"], help="after --")
    args = parser.parse_args()
    for seed in [] if args.table else args.seeds:
        set_threads()
        before = original_rate(args.original) if args.original else 0
        row = measure([*args.flags, "--seed", str(seed), "--quiet"], args.data_dir)
        if args.original:
            after = original_rate(args.original)
            seconds = ORIGINAL_EPOCHS * 60_000 / statistics.mean((before, after))
            row |= dict(original_before=round(before, 1), original_after=round(after, 1))
            row["times_faster"] = round(seconds / row["seconds"])
        results.add(args.output, row, "command", "machine")
    rows = results.read(args.output)
    results.print_table(rows, COLUMNS)
    runs = defaultdict(list)
    for row in rows:
        runs[re.sub(r" --seed \d+", "", row["command"]), row["machine"]].append(row)
    for (command, machine), group in sorted(runs.items()):
        seconds = statistics.mean(float(row["seconds"]) for row in group)
        accuracy = spread(group, "test_accuracy")
        print(f"\n- `{command}`, {len(group)} seeds: {accuracy} in {seconds:.0f} s ({machine})")


if __name__ == "__main__":
    main()
