"""Kill a training run again and again, resume it, and compare it with one that was left alone.

    python benchmarks/kill_resume.py                    50 times SIGKILL, 5 times SIGTERM, 5 times Ctrl-C
    python benchmarks/kill_resume.py --kills 10 --seed 3

Every run is a short real training by `python train.py` on the CPU. Half of the SIGKILLs come at a random moment of the
process, half aim at the middle of a save: as soon as its temporary file is there, or a random few milliseconds later,
when it may be over. After every kill, what lies in the folder must be whole: each checkpoint can be loaded, and the
history has no gap. A run that is over is followed by another one, until all kills are made. At the end each run must be
what the one left alone is: the same weights, averages, optimiser state and history (but for the seconds), bit for bit,
and no file more.

The exit status is not 0 if anything differs.
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
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
from model import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
RUN = """--train-size 1000 --val-size 500 --epochs 10 --batch-size 50 --stem-dims 8 16 --stem-blocks 0 1 1
    --embed-dim 32 --num-heads 2 --drop-path 0.1 --device cpu --precision float32 --quiet""".split()
CHECKPOINTS = ("best.pt", "last.pt")


def start(data_dir: Path, run: Path) -> subprocess.Popen:
    """Begin the run in a folder, or go on with it if it has saved a position."""
    flags = ["--resume"] if (run / "last.pt").exists() else RUN
    command = [sys.executable, ROOT / "train.py", "--data-dir", data_dir, "--output-dir", run, *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def temporary_files(run: Path) -> list[Path]:
    """The files that are being written, or that a killed process left behind."""
    return list(run.glob(".*.part"))


def kill_at(process: subprocess.Popen, moment: float) -> bool:
    """SIGKILL the process after so many seconds; False if it was over before."""
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def kill_in_save(process: subprocess.Popen, run: Path, number: int, delay: float) -> bool:
    """SIGKILL the process so many seconds after its number-th save has begun; False if it was over before."""
    known = set(temporary_files(run))
    while process.poll() is None:
        time.sleep(0.0005)  # a tighter loop would take a core from the run
        new = set(temporary_files(run)) - known
        known |= new
        number -= len(new)
        if number <= 0:
            time.sleep(delay)
            process.kill()
            process.wait()
            return True
    return False


def state(run: Path) -> dict[str, Any]:
    """All that a run leaves but its times: checkpoints, history, names of files."""
    found: dict[str, Any] = {}
    for name in CHECKPOINTS:
        checkpoint = load_checkpoint(run / name)[1]
        training = {k: v for k, v in checkpoint.pop("training", {}).items() if k != "seconds"}
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.pop("history")]
        checkpoint["train_config"].pop("output_dir")
        found[name] = checkpoint | dict(training=training, history=history)
    with open(run / "history.csv", newline="") as file:
        found["history.csv"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    found["files"] = sorted(path.name for path in run.iterdir())
    return found


def difference(a: Any, b: Any, name: str = "") -> str | None:
    """Where two results first differ in value or type; None if nowhere."""
    if type(a) is not type(b):
        return name
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    if isinstance(a, dict | list | tuple):
        if len(a) != len(b) or (isinstance(a, dict) and a.keys() != b.keys()):
            return name
        pairs = [(k, a[k], b[k]) for k in a] if isinstance(a, dict) else zip(range(len(a)), a, b, strict=True)
        return next((found for k, x, y in pairs if (found := difference(x, y, f"{name}/{k}"))), None)
    return None if a == b else name


def check_folder(run: Path) -> None:
    """Make sure that a killed process left nothing half-written under a checkpoint's or the history's name.

    Raises:
        ValueError: it did.
    """
    for name in CHECKPOINTS:
        if (run / name).exists():
            load_checkpoint(run / name)
    if (run / "history.csv").exists():
        with open(run / "history.csv", newline="") as file:
            epochs = [row["epoch"] for row in csv.DictReader(file)]
        if epochs != [str(i + 1) for i in range(len(epochs))]:
            raise ValueError(f"history.csv has the epochs {epochs}")


def finish(data_dir: Path, run: Path) -> str:
    """Let a run come to its end and return what it prints."""
    process = start(data_dir, run)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"kill_resume.py: error: the run ended with {process.returncode}: {output.strip()[-500:]}")
    return output


def kill_runs(folder: Path, data_dir: Path, kills: int, generator: random.Random, seconds: float) -> Counter:
    """Kill runs until so many kills are made, resume each, and let each come to its end.

    Returns:
        How many kills fell where, and how many runs there were.
    """
    counts: Counter = Counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        run = folder / f"killed{counts['runs']}"
        is_over = False
        while not is_over and counts["kills"] < kills:
            left_before = set(temporary_files(run))
            process = start(data_dir, run)
            if counts["kills"] % 2:
                was_killed = kill_in_save(process, run, generator.randint(1, 4), generator.choice((0, 0, 0.002, 0.01)))
            else:
                was_killed = kill_at(process, generator.uniform(0, seconds))
            process.communicate()
            is_over = not was_killed
            if was_killed:
                counts["kills"] += 1
                counts["left a temporary file"] += bool(set(temporary_files(run)) - left_before)
                counts["before the first position was saved"] += not (run / "last.pt").exists()
                check_folder(run)
        finish(data_dir, run)
    return counts


def stop_run(run: Path, data_dir: Path, number: int, generator: random.Random, times: int) -> int:
    """Stop a run by a signal so many times, resume it, and let it come to its end.

    Returns:
        How many of the signals ended with the position that the run named saved, and with the right exit status.
    """
    good = 0
    for _ in range(times):
        process = start(data_dir, run)
        for line in process.stdout:
            if "parameters; device" in line or line.startswith("resuming"):
                break
        time.sleep(generator.uniform(0.1, 1.0))
        process.send_signal(number)
        output, _ = process.communicate()
        position = load_checkpoint(run / "last.pt")[1]["training"]
        within = f"stopped in epoch {position['epoch'] + 1} after step {position['step']};"
        named = within if position["step"] else f"stopped after epoch {position['epoch']};"
        good += process.returncode == 128 + number and named in output and "--resume" in output
    finish(data_dir, run)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    data_dir, generator = args.data_dir.absolute(), random.Random(args.seed)
    dataset.prepare(data_dir)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        finish(data_dir, folder / "alone")
        seconds = time.perf_counter() - started
        finish(data_dir, folder / "again")
        whole = state(folder / "alone")
        wrong = []

        def compare(run: Path) -> str:
            found = difference(whole, state(run))
            wrong.extend([found] if found else [])
            return f"first difference at {found}" if found else "identical bit for bit"

        print("| what was done | what happened | against the run left alone |")
        print("|---|---|---|")
        threads = torch.get_num_threads()
        print(f"| the same run a second time, {threads} CPU threads | | {compare(folder / 'again')} |", flush=True)
        counts = kill_runs(folder, data_dir, args.kills, generator, seconds)
        kills, runs = counts.pop("kills"), counts.pop("runs")
        said = ", ".join(f"{n} {name}" for name, n in counts.items())
        results = {compare(folder / f"killed{i + 1}") for i in range(runs)}
        print(f"| SIGKILL, {kills} times in {runs} runs | {said} | {'; '.join(results)} |", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            run = folder / number.name
            good = stop_run(run, data_dir, number, generator, times=5)
            wrong.extend([number.name] if good < 5 else [])
            said = f"{good} times the position saved, exit status {128 + number}"
            print(f"| {number.name}, 5 times in a run | {said} | {compare(run)} |", flush=True)
    if wrong:
        raise SystemExit(f"kill_resume.py: error: {len(wrong)} runs differ")


if __name__ == "__main__":
    main()
