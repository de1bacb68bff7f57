"""A student edits the code."""

import csv
import json
import shutil
import subprocess
import sys

import torch
from conftest import ROOT, SMALL_RUN, flags_of

import dataset

ROWS = """    # my own
    use_scale=(False, None, "a switch"),
    loss_scale=(1.0, (0.0, 10.0), "a number"),
    names=((), None, "some words"),
"""
ROW_FLAGS = "--use-scale --loss-scale 0.5 --names a b".split()
LOSS = "    loss = loss * config.loss_scale if config.use_scale else loss\n"
COLUMN = '    row["grad_norm"] = run.model.head.weight.norm()\n'
WEIGHTS = """        self.register_buffer("seen", torch.tensor(False))
        self.gain = nn.Parameter(torch.zeros(1).bfloat16())
"""
FORWARD = """        self.seen |= self.training
        x = x * (1 + self.gain)
"""
EDITS = [  # file, new lines, how the line begins that they come before
    ("train.py", ROWS, ")\n# What the record, its teacher"),
    ("train.py", LOSS, "    return loss, logits\n"),
    ("train.py", COLUMN, "    # A number that you add"),
    ("model.py", WEIGHTS, "        self.reset_parameters()"),
    ("model.py", FORWARD, "        return self.pool("),
]


def edit(folder):
    """Copy the scripts and change them with a text editor."""
    for path in (*ROOT.glob("*.py"), ROOT / "common", ROOT / "training"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    for name, new, line in EDITS:
        text = (folder / name).read_text()
        assert text.count(line) == 1
        (folder / name).write_text(text.replace(line, new + line))


# All in one process, since importing PyTorch takes seconds.
DRIVER = """
import json, sys
import dataset, model
assert "sklearn" not in sys.modules
import train
assert "cv2" not in sys.modules and "matplotlib.pyplot" not in sys.modules
files, *commands = json.load(sys.stdin)
dataset.FILES = files
take_step, calls = train.take_step, []
def counting(*arguments):
    take_step(*arguments)
    calls.append(1)
    if len(calls) == 13:
        raise KeyboardInterrupt
train.take_step = counting
for command in commands:
    sys.argv = ["train.py", *command]
    try:
        train.main()
        print("exit status 0")
    except SystemExit as end:
        print("exit status", end.code)
"""


def test_a_student_adds_settings_a_number_and_weights(small_data, tmp_path):
    edit(tmp_path)
    (tmp_path / "driver.py").write_text(DRIVER)
    data = ["--data-dir", str(small_data)]
    start = [*flags_of(SMALL_RUN), *data, *ROW_FLAGS]
    commands = [start, ["--resume"], ["--evaluate", "checkpoints/best.pt", "--threads", "1", *data]]
    commands += [["--loss-scale", "11"], ["--resume", "--loss-scale", "1"]]
    options = dict(input=json.dumps([dataset.FILES, *commands]), capture_output=True, text=True)
    result = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, **options)
    statuses = [line for line in result.stdout.splitlines() if line.startswith("exit status ")]
    assert [status.split()[2] for status in statuses[:3]] == ["130", "0", "0"], result.stderr
    assert "--loss-scale 11.0: give a number from 0.0 to 10.0" in statuses[3]
    assert "the run to resume has --loss-scale 0.5: leave yours out" in statuses[4]
    assert result.stdout.count("test accuracy") == 2

    with (tmp_path / "checkpoints" / "history.csv").open(newline="") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file)]
    assert len(norms) == 2 and norms[0] != norms[1]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert [row["grad_norm"] for row in checkpoint["history"]] == norms
    expected = dict(use_scale=True, loss_scale=0.5, names=("a", "b"))
    assert checkpoint["train_config"].items() >= expected.items()
    for weights in (checkpoint["model"], checkpoint["training"]["model"]):
        assert weights["seen"].dtype == torch.bool and weights["seen"].item()
        assert weights["gain"].dtype == torch.bfloat16 and weights["gain"].item() != 0
