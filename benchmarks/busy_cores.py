"""Training speed beside other work: images per second while zero, one or two other processes keep the cores busy.

    python benchmarks/busy_cores.py

Each figure is the speed that `python train.py --recipe fast` reports for a short epoch, the median of three rounds in
which all settings take turns. The ratio is to PyTorch's own threads on the idle machine.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CORES = str(os.cpu_count())
SETTINGS = {  # what goes before the command: `env` with variables, `nice` for a low priority
    "as this project does it": "env",
    "the same at low priority": "nice -n 10",
    "PyTorch's threads": f"env OMP_NUM_THREADS={CORES}",
    "PyTorch's threads, OMP_WAIT_POLICY=PASSIVE": f"env OMP_NUM_THREADS={CORES} OMP_WAIT_POLICY=PASSIVE",
    "one thread": "env OMP_NUM_THREADS=1",
    "one thread at low priority": "nice -n 10 env OMP_NUM_THREADS=1",
}


def images_per_second(prefix: str, images: int, data_dir: str) -> float:
    """The speed that one short epoch reports."""
    flags = f"--recipe fast --epochs 1 --train-size {images} --quiet"
    with tempfile.TemporaryDirectory() as folder:
        command = [*prefix.split(), sys.executable, str(ROOT / "train.py"), *flags.split()]
        command += ["--data-dir", data_dir, "--output-dir", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if speed := re.search(r"(\d+) images/s", line):
                    process.kill()  # the rest is of no interest here
                    return float(speed[1])
    raise SystemExit("busy_cores.py: error: train.py reported no speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6400, help="of an epoch (default: 6,400)")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    speeds: dict[tuple[str, int], list[float]] = {(name, busy): [] for name in SETTINGS for busy in (0, 1, 2)}
    for _ in range(args.rounds):
        for busy in (0, 1, 2):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                for name, prefix in SETTINGS.items():
                    # PyTorch's own threads, or a low priority, may take minutes for what takes seconds elsewhere.
                    is_slow = busy == 2 and ("PyTorch" in name or "low priority" in name)
                    images = args.images // 4 if is_slow else args.images
                    speeds[name, busy].append(images_per_second(prefix, images, args.data_dir))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    alone = statistics.median(speeds["PyTorch's threads", 0])
    print(f"{CORES} cores, {torch.backends.cpu.get_cpu_capability()}; images/s, and the ratio to {alone:.0f}\n")
    print("| | alone | beside one busy process | beside two |\n|---|---:|---:|---:|")
    for name in SETTINGS:
        medians = [statistics.median(speeds[name, busy]) for busy in (0, 1, 2)]
        print(f"| {name} | " + " | ".join(f"{speed:.0f}, {speed / alone:.2f}" for speed in medians) + " |")


if __name__ == "__main__":
    main()
