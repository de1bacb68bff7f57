"""Kill training runs again and again, resume them, and compare them with one that was left alone.

    python benchmarks/kill_resume.py              50 kills: 20 SIGKILLs in a save, 20 at any moment, 5 SIGTERM, 5 Ctrl-C
    python benchmarks/kill_resume.py --kills 4    one of each

Every run is a short training by `python train.py` on the CPU, with stochastic depth. "In a save" is as soon as a
temporary file is there, or a few milliseconds later, when the save may be over. Whatever lies in the folder after a
kill must be whole. Each kill is followed by --resume, and each finished run by a new one, until all kills are made.
In the end each run must equal the one left alone, bit for bit: weights, averages, optimiser state and history (but
for the seconds), and no extra file. The exit status is not 0 if anything differs.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load_checkpoint
from training.processes import set_threads

ROOT = Path(__file__).resolve().parent.parent
RUN = """--train-size 1000 --val-size 500 --epochs 10 --batch-size 50 --stem-dims 8 16 --stem-blocks 0 1 1
    --embed-dim 32 --num-heads 2 --drop-path 0.1 --device cpu --precision float32 --quiet""".split()
IN_A_SAVE, ANY_MOMENT = "SIGKILL in a save", "SIGKILL at any moment"
MOMENTS = (IN_A_SAVE, ANY_MOMENT, "SIGTERM", "Ctrl-C") + 3 * (IN_A_SAVE, ANY_MOMENT)  # in turn
SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
DIFFERS = ("seconds", "output_dir")  # between runs that are the same
HEAD = "| what was tried | times | what happened |\n|---|---:|---|"  # of the table of this script and of hostile.py


def start(run: Path, *flags: object) -> subprocess.Popen:
    """Begin the run in a folder, or go on with it if it has saved an epoch."""
    flags = ("--resume",) if (run / "last.pt").exists() else (*RUN, *flags)
    command = [sys.executable, "-u", ROOT / "train.py", "--output-dir", run, *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    """Let a run come to its end."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"kill_resume.py: error: the run ended with {process.returncode}: {output.strip()[-500:]}")


def kill(process: subprocess.Popen, run: Path, moment: str, generator: random.Random, seconds: float) -> bool:
    """Kill the process at a moment of `MOMENTS`; False if it was over before. A whole run takes `seconds`."""
    if moment == ANY_MOMENT:
        with suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0, seconds))
    elif moment == IN_A_SAVE:
        saves, before = generator.randint(1, 8), set(run.glob(".*.part"))  # three in an epoch
        while process.poll() is None and saves > 0:
            time.sleep(0.0005)  # a tighter loop would take a core from the run
            parts = set(run.glob(".*.part"))
            saves, before = saves - len(parts - before), parts
        time.sleep(generator.choice((0, 0, 0.002, 0.01)))
    else:
        next((line for line in process.stdout if " parameters, " in line), None)  # before it, Python is still starting
        time.sleep(generator.uniform(0, 1))
    process.send_signal(SIGNALS.get(moment, signal.SIGKILL))
    output, _ = process.communicate()
    expected = 128 + SIGNALS[moment] if moment in SIGNALS else -signal.SIGKILL
    if process.returncode not in (0, expected) or "Traceback" in output:
        raise SystemExit(f"kill_resume.py: error: {moment} ended with {process.returncode}: {output.strip()[-500:]}")
    return process.returncode != 0


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers, words and tensors of a result, each with its place in it; but not those of `DIFFERS`."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in DIFFERS:
                yield from leaves(part, f"{name}/{key}")
    else:
        yield name, (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def state(run: Path) -> set[tuple[str, Any]]:
    """All that a run leaves: checkpoints, history and file names, except what a restarted first epoch put aside."""
    found: dict[str, Any] = {name: load_checkpoint(run / name)[1] for name in ("best.pt", "last.pt")}
    found["history.csv"] = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    return set(leaves(found)) | {(path.name, "file") for path in run.iterdir() if path.name[:9] != "previous-"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    generator, flags = random.Random(args.seed), ("--data-dir", args.data_dir, "--threads", set_threads())
    made, left, begun_anew = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "alone"
        started = time.perf_counter()
        finish(start(alone, *flags))
        seconds, runs, is_over = time.perf_counter() - started, [], True
        while made.total() < args.kills:
            if is_over:
                runs.append(Path(name) / f"killed{len(runs) + 1}")
            run, moment = runs[-1], MOMENTS[made.total() % len(MOMENTS)]
            is_over = not kill(start(run, *flags), run, moment, generator, seconds)
            if not is_over:
                made[moment] += 1
                left[moment] += any(run.glob(".*.part"))
                begun_anew[run] += (run / "best.pt").exists() and not (run / "last.pt").exists()
                for path in run.glob("*.pt"):
                    load_checkpoint(path)
        if not is_over:
            finish(start(runs[-1], *flags))
        print(HEAD)
        for moment, number in made.items():
            said = f"exit status {128 + SIGNALS[moment]}, " if moment in SIGNALS else ""
            print(f"| {moment} | {number} | {said}a temporary file left {left[moment]} times |")
        wrong = [min(name for name, _ in found) for run in runs if (found := state(alone) ^ state(run))]
        wrong += ["/previous-*" for run in runs if len(list(run.glob("previous-*"))) > begun_anew[run]]
        wrong += [f"/{moment} left temporary files" for moment in SIGNALS if left[moment]]
        said = f"first difference at {', '.join(wrong)}" if wrong else "identical bit for bit"
        print(f"| these runs in the end, against one left alone | {len(runs)} | {said} |")
    if wrong:
        raise SystemExit(f"kill_resume.py: error: {len(wrong)} runs differ")


if __name__ == "__main__":
    main()
