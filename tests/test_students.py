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
    repeats=(1, (1, 9), "a whole number"),
    loss_scale=(1.0, (0.0, 10.0), "a number"),
    kind=("plain", ("plain", "fancy"), "one of two words"),
    sizes=((1, 2), (1, 99), "a row of numbers"),
    names=((), None, "some words"),
"""
ROW_FLAGS = "--use-scale --repeats 2 --loss-scale 0.5 --kind fancy --sizes 3 4 --names a b".split()
EDITS = [  # file, how a line of it begins, what the line becomes
    (
        "train.py",
        "    return loss, logits\n",
        "    loss = loss * config.loss_scale if config.use_scale else loss\n{line}",
    ),
    (
        "train.py",
        "    # A number that you add",
        '{line}    row["grad_norm"] = run.model.head.weight.norm()\n',
    ),
    (
        "model.py",
        "        self.reset_parameters()",
        '{line}        self.register_buffer("seen", torch.tensor(False))\n'
        "        self.gain = nn.Parameter(torch.zeros(1).bfloat16())\n",
    ),
    (
        "model.py",
        "        return self.pool(",
        "        self.seen |= self.training\n        x = x * (1 + self.gain)\n{line}",
    ),
]


def edit(folder):
    """Copy the scripts and change them with a text editor."""
    for path in (*ROOT.glob("*.py"), ROOT / "common", ROOT / "training"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    text = (folder / "train.py").read_text()
    table_end = ")\n# What the record and its teacher"
    assert text.count(table_end) == 1
    (folder / "train.py").write_text(text.replace(table_end, ROWS + table_end))
    for name, start, new in EDITS:
        lines = (folder / name).read_text().splitlines(keepends=True)
        (number,) = (i for i, line in enumerate(lines) if line.startswith(start))
        lines[number] = new.format(line=lines[number])
        (folder / name).write_text("".join(lines))


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
    commands += [["--repeats", "10"], ["--resume", "--kind", "plain"]]
    options = dict(
        input=json.dumps([dataset.FILES, *commands]), capture_output=True, text=True, timeout=300
    )
    result = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, **options)
    statuses = [line for line in result.stdout.splitlines() if line.startswith("exit status ")]
    assert [status.split()[2] for status in statuses[:3]] == ["130", "0", "0"], result.stderr
    assert "--repeats 10: give a whole number from 1 to 9" in statuses[3]
    assert "the run to resume has --kind fancy: leave yours out" in statuses[4]
    assert result.stdout.count("test accuracy") == 2

    with (tmp_path / "checkpoints" / "history.csv").open(newline="") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file)]
    assert len(norms) == 2 and norms[0] != norms[1]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert [row["grad_norm"] for row in checkpoint["history"]] == norms
    expected = dict(use_scale=True, repeats=2, loss_scale=0.5, kind="fancy", sizes=(3, 4))
    assert checkpoint["train_config"].items() >= (expected | dict(names=("a", "b"))).items()
    for weights in (checkpoint["model"], checkpoint["training"]["model"]):
        assert weights["seen"].dtype == torch.bool and weights["seen"].item()
        assert weights["gain"].dtype == torch.bfloat16 and weights["gain"].item() != 0
