"""Several processes through torchrun: one reports and saves, all together do what one alone would do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import assert_identical, state_of

import train
from model import load_checkpoint

FLAGS = """--val-size 500 --batch-size 64 --stem-dims 4 8 --stem-blocks 0 1 1 --embed-dim 32 --depth 1 --num-heads 2
    --drop-path 0 --shift 0 --device cpu --precision float32 --quiet""".split()
# The last batch of an epoch has 3 images, 2 for one process and 1 for the other; or 1, less than there are processes.
UNEVEN = ["--train-size", "1923", "--epochs", "6"]
LEFT_OUT = ["--train-size", "6401", "--epochs", "3"]


@pytest.fixture
def start(data_dir: Path, tmp_path: Path):
    """Starts two processes that train into a folder of that name; returns torchrun's own process."""
    started = []

    def start(name: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(ROOT / "train.py"), "--data-dir", str(data_dir), "--output-dir", str(tmp_path / name), *flags]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # which ends its children, too
            process.communicate(timeout=60)


def test_two_processes_train_like_one_and_one_of_them_reports(start, run_config, tmp_path):
    process = start("two", *FLAGS, *UNEVEN)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "2 processes" in output
    assert len(re.findall(r"^epoch \d/6 ", output, re.MULTILINE)) == 6
    assert output.count("test accuracy") == 1
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"best.pt", "last.pt", "history.csv", "curves.png", "confusion_matrix.png"}

    given = vars(train.parse_flags([*FLAGS, *UNEVEN])[1])
    alone = load_checkpoint(train.train(run_config(**given)))[1]["history"]
    together = load_checkpoint(tmp_path / "two" / "last.pt")[1]["history"]
    # The same images with the same augmentation in the same steps. What differs is that batch norm sees half a batch.
    for one, two in zip(alone, together, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.1)
    assert together[-1]["val_accuracy"] == pytest.approx(alone[-1]["val_accuracy"], abs=0.1)
    assert together[-1]["val_accuracy"] > 0.5


def test_two_interrupted_processes_end_bit_for_bit_like_uninterrupted_ones(start, tmp_path):
    whole = start("whole", *FLAGS, *LEFT_OUT)
    errors = whole.communicate(timeout=300)[1]
    assert whole.returncode == 0, errors
    parts = start("parts", *FLAGS, *LEFT_OUT)
    while not (tmp_path / "parts" / "history.csv").exists():
        assert parts.poll() is None, parts.communicate()
        time.sleep(0.05)
    time.sleep(0.3)  # an epoch has 100 steps: now the second one is under way
    parts.send_signal(signal.SIGTERM)
    output = parts.communicate(timeout=300)[0]
    assert f"torchrun --nproc-per-node=2 train.py --resume --output-dir {tmp_path / 'parts'}" in output
    position = load_checkpoint(tmp_path / "parts" / "last.pt")[1]["training"]
    assert position["epoch"] >= 1 and position["step"] > 0
    resumed = start("parts", "--resume")
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert f"resuming at epoch {position['epoch'] + 1}, step {position['step']} of 100" in output
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_a_batch_that_cannot_be_shared_is_refused(start, tmp_path):
    process = start("refused", *FLAGS, *UNEVEN, "--batch-size", "1")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "train.py: error: --batch-size 1: give at least 1 image for each of 2 processes" in errors
    assert not (tmp_path / "refused").exists()


def test_a_run_is_resumed_by_as_many_processes_as_it_had(start, run_config, tmp_path):
    train.train(run_config(epochs=1))
    process = start("run", "--resume")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "train.py: error: the run to resume has 1 processes, not 2" in errors
