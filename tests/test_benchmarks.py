"""The tables that the benchmarks print agree with the saved results and the shipped checkpoint."""

import csv
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from model import MAX_PARAMETERS, load_checkpoint


@pytest.fixture
def run_benchmark():
    """Runs one of the benchmark scripts in a process of its own and returns what it prints."""

    def run(script: str, *flags: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout

    return run


def test_the_seeds_table_gives_the_mean_and_spread_of_the_taught_recipe(run_benchmark):
    with open(ROOT / "benchmarks" / "seeds.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["command"] == "python train.py --recipe taught"]
    accuracies = [100 * float(row["test_accuracy"]) for row in rows]
    assert len(rows) >= 3 and len({row["seed"] for row in rows}) == len(rows)
    assert all(int(row["parameters"]) <= MAX_PARAMETERS for row in rows)
    expected = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
    assert expected in run_benchmark("seeds.py")


def test_the_shipped_checkpoint_is_the_first_seed_of_the_record_at_its_best_validated_epoch():
    _, checkpoint = load_checkpoint(ROOT / "checkpoints" / "shipped" / "model.pt")
    config, history = checkpoint["train_config"], checkpoint["history"]
    assert (config["recipe"], config["seed"]) == ("record", 0)
    assert len(history) == config["epochs"] == train.RECIPES["record"]["epochs"]
    best = max(history, key=lambda row: row["val_accuracy"])
    assert (checkpoint["epoch"], checkpoint["val_accuracy"]) == (best["epoch"], best["val_accuracy"])


def test_the_default_heatmap_won_on_validation_and_beats_every_baseline_on_test_images(run_benchmark):
    pytest.importorskip("cv2", reason="OpenCV cannot be loaded", exc_type=ImportError)
    with open(ROOT / "benchmarks" / "faithfulness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    default = re.search(r"^\| \*\*(.+?)\*\*", run_benchmark("faithfulness.py"), re.MULTILINE)[1]
    candidates = [row for row in rows if (row["split"], row["kind"]) == ("validation", "candidate")]
    assert max(candidates, key=lambda r: float(r["insertion"]) - float(r["deletion"]))["map"] == default
    (ours,) = [row for row in rows if (row["split"], row["map"]) == ("test", default)]
    baselines = [row for row in rows if (row["split"], row["kind"]) == ("test", "baseline")]
    assert len(baselines) >= 6 and all(int(row["images"]) >= 1000 for row in rows if row["split"] == "test")
    for row in baselines:
        assert float(ours["deletion"]) < float(row["deletion"]), row["map"]
        assert float(ours["insertion"]) > float(row["insertion"]), row["map"]


@pytest.mark.parametrize("script", ["ablations.py", "peers.py", "time_to_accuracy.py"])
def test_saved_results_are_printed_as_tables(run_benchmark, script):
    lines = [line for line in run_benchmark(script).splitlines() if line.startswith("|")]
    assert len(lines) >= 5
    assert all(re.fullmatch(r"\|.*\|", line) for line in lines)
    commands = re.findall(r"`(python [^`]+)`", "\n".join(lines))
    assert len(commands) >= 3
