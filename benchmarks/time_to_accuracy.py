"""How long a recipe takes from the start of the process to tested weights, how accurate these are, and at what speed.

    python benchmarks/time_to_accuracy.py                                print the table of time_to_accuracy.json
    python benchmarks/time_to_accuracy.py --seeds 0 1 2                  train with --recipe fast, save a line for each
    python benchmarks/time_to_accuracy.py --seeds 0 --processes 2        the same by torchrun, in two processes
    python benchmarks/time_to_accuracy.py --seeds 0 --original FOLDER    beside the project this one re-creates

Everything counts, from Python's start to its end: the check of the data, training, saving, the test split, pictures.
The ceiling is the mean rate of large matrix products, in the type that training computes in, right before and right
after each run. A step counts as three forward passes, though a first layer that is not trained needs less.

FOLDER is a clone of https://github.com/James-sjt/FashionMnist. Its own model and data loader, with its batch size of 2,
take 500 steps before and after each run; all its 97 epochs of 60,000 images are counted at that speed, since its 93.1 %
(93.2 % in its present README) are those of its best epoch on the test split, the 97th. Its evaluations do not count.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import step_time

import train
from model import load_checkpoint
from training.processes import choose_precision, set_threads
from training.settings import make_parser

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "time_to_accuracy.json"
ORIGINAL_EPOCHS = 97

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
for i, (images, targets) in enumerate(DataLoader(FashionMNIST("train", "False", "cpu"), batch_size=2, shuffle=True)):
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
    try:
        return float(subprocess.run(command, cwd=folder / "MyModel", capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).splitlines()[-1]
        raise SystemExit(f"time_to_accuracy.py: error: the original in {folder} does not run: {reason}") from None


def measure(seed: int, processes: int, flags: list[str]) -> dict[str, object]:
    """Train once in processes of their own and return what it took."""
    flags = [*flags, "--seed", str(seed), "--quiet"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    given = vars(make_parser(train.SETTINGS, "").parse_args(flags))
    precision = choose_precision(given.get("precision", "auto"), torch.device("cpu"))
    ceilings = [step_time.matrix_rate(precision)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags, "--output-dir", folder]
        with open(Path(folder) / "output.txt", "w+") as output:
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=output)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            output.seek(0)
            text = output.read()
        if status:
            raise SystemExit(f"time_to_accuracy.py: error: {shlex.join(command)} failed")
        ceilings.append(step_time.matrix_rate(precision))
        model, checkpoint = load_checkpoint(Path(folder) / "best.pt")
    history = checkpoint["history"]
    images_per_second = sum(row["images"] for row in history) / history[-1]["seconds"]
    return dict(
        command=shlex.join(["torchrun" if processes > 1 else "python", *launcher[3:], "train.py", *flags]),
        test_accuracy=float(re.search(r"^test accuracy ([\d.]+)", text, re.MULTILINE)[1]),
        seconds=round(seconds, 1),
        training_seconds=round(history[-1]["seconds"], 1),
        images_per_second=round(images_per_second),
        gflops=round(images_per_second * 6 * step_time.multiply_adds(model) / 1e9),
        ceiling_gflops=round(statistics.mean(ceilings)),
        # of one process; on Linux the unit is KiB
        peak_megabytes=round(usage.ru_maxrss / 1024) if processes == 1 and sys.platform == "linux" else None,
        parameters=model.num_parameters(),
        environment=f"{checkpoint['environment']}, {torch.backends.cpu.get_cpu_capability()}, {platform.system()}",
    )


def print_table(rows: list[dict]) -> None:
    """Print a line for each run, and the mean of each command's seeds on one kind of machine."""
    columns = "command|test accuracy|seconds in all|training|images/s|share of the ceiling|MB|times faster".split("|")
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        share = f"{row['gflops']} of {row['ceiling_gflops']} GFLOP/s, {row['gflops'] / row['ceiling_gflops']:.0%}"
        faster = f"{row['times_faster']:.0f}" if row.get("times_faster") else ""
        print(
            f"| `{row['command']}` | {row['test_accuracy']:.2%} | {row['seconds']} | {row['training_seconds']} "
            f"| {row['images_per_second']} | {share} | {row['peak_megabytes'] or ''} | {faster} |"
        )
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((re.sub(r" --seed \d+", "", row["command"]), row["environment"]), []).append(row)
    print()
    for (command, environment), lines in groups.items():
        accuracies = [100 * row["test_accuracy"] for row in lines]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(lines) > 1 else ""
        print(
            f"- `{command}`, {len(lines)} seeds: {statistics.mean(accuracies):.2f}{spread} % in "
            f"{statistics.mean(row['seconds'] for row in lines):.0f} seconds ({environment})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="train with each of these")
    parser.add_argument("--processes", type=int, default=1, help="by torchrun, if more than 1")
    parser.add_argument("--original", type=Path, metavar="FOLDER", help="a clone of the original project")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --, instead of --recipe fast")
    args = parser.parse_args()
    if args.original and not args.seeds:
        parser.error("--original is measured beside a run: give --seeds, too")
    if args.seeds:
        set_threads()
    rows = json.loads(RESULTS.read_text())
    for seed in args.seeds:
        rates = [original_rate(args.original)] if args.original else []
        row = measure(seed, args.processes, args.flags or ["--recipe", "fast"])
        if args.original:
            rates.append(original_rate(args.original))
            hours = ORIGINAL_EPOCHS * 60_000 / statistics.mean(rates) / 3600
            row |= dict(original_images_per_second=[round(rate, 1) for rate in rates], original_hours=round(hours, 1))
            row["times_faster"] = round(3600 * hours / row["seconds"])
        print(json.dumps(row), flush=True)
        done = row["command"], row["environment"]
        rows = [other for other in rows if (other["command"], other["environment"]) != done] + [row]
        rows.sort(key=lambda row: row["command"])
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
