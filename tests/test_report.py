import csv
import math

import pytest
import torch

from dataset import CLASS_NAMES
from training import report

# Three images of class 0, one of them taken for class 1; and one image of class 1.
LABELS, PREDICTIONS = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
HISTORY = [
    dict(epoch=1, lr=0.2, images=640, train_loss=2.0, train_accuracy=0.5, seconds=10.0),
    dict(epoch=2, lr=0.1, images=320, train_loss=1.0, train_accuracy=0.75)
    | dict(val_loss=1.5, val_accuracy=0.625, seconds=30.0),
]


def test_the_report_has_precision_recall_and_f1_of_every_class():
    lines = report.class_report(LABELS, PREDICTIONS, CLASS_NAMES).splitlines()
    rows = [line.split()[-5:] for line in lines]
    # Both answers are right, for 2 of 3 images; the last is neither there nor answered.
    assert ["T-shirt/top", "1.0000", "0.6667", "0.8000", "3"] in rows
    assert ["boot", "0.0000", "0.0000", "0.0000", "0"] in rows


def test_a_summary_has_cross_entropy_and_accuracy(capsys):
    logits = torch.zeros(4, 10)
    # the answer's probability is 11 / 20, any other's 1 / 20
    logits[torch.arange(4), PREDICTIONS] = math.log(11.0)
    loss = (3 * math.log(20 / 11) + math.log(20)) / 4
    row = report.summary("val", logits, LABELS, CLASS_NAMES, quiet=True)
    assert row == dict(val_loss=pytest.approx(loss, rel=1e-5), val_accuracy=0.75)
    assert capsys.readouterr().out == ""
    report.summary("val", logits, LABELS, CLASS_NAMES, quiet=False)
    out = capsys.readouterr().out
    assert out.startswith("\nval split\n")
    assert report.class_report(LABELS, PREDICTIONS, CLASS_NAMES) in out


def test_the_line_of_an_epoch_gives_pace_and_time_left():
    # the epoch took 20 seconds, 3 like it are left
    line = report.epoch_line(HISTORY, steps=[10, 4, 4, 4, 4])
    assert line == (
        "epoch 2/5  train_loss 1.0000  train_accuracy 0.7500  "
        "val_loss 1.5000  val_accuracy 0.6250  "
        "16 images/s  elapsed 0:00:30  remaining 0:01:00"
    )
    # 10 steps took 10 seconds; 16 are left
    first = report.epoch_line(HISTORY[:1], steps=[10, 4, 4, 4, 4])
    assert "val" not in first and first.endswith("remaining 0:00:16")


def test_the_history_is_a_table_whose_columns_come_and_go(tmp_path):
    path = tmp_path / "history.csv"
    report.write_history(HISTORY, path)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["val_loss"] == first["val_accuracy"] == ""
    assert {name: float(value) for name, value in second.items()} == HISTORY[1]


def test_the_curves_are_those_of_the_history():
    drawn = []
    for axes in report.draw_curves(HISTORY, 0.6).axes:
        drawn.append({line.get_label(): line.get_xydata().tolist() for line in axes.lines})
    assert drawn == [
        {"train split, as augmented": [[1, 2.0], [2, 1.0]], "val split": [[2, 1.5]]},
        {"train split, as augmented": [[1, 0.5], [2, 0.75]], "val split": [[2, 0.625]]}
        | {"test split: 0.6000": [[0, 0.6], [1, 0.6]]},  # from the left edge to the right one
        dict(lr=[[1, 0.2], [2, 0.1]]),
    ]


def test_no_legend_covers_a_point_even_of_a_single_epoch():
    figure = report.draw_curves(HISTORY[1:], 0.6)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert not (axes.get_xticks() % 1).any()
        assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)


def test_the_confusion_matrix_has_the_true_classes_as_rows(tmp_path):
    names = ("a", "b", "$\\no formula$")
    figure = report.draw_confusion_matrix(LABELS, PREDICTIONS, names)
    (axes,) = figure.axes
    assert axes.images[0].get_array().tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    labels = [axis.get_text() for axis in axes.get_yticklabels()]
    assert labels == list(names) and axes.get_ylabel() == "True label"
    assert axes.get_title() == "test split: 75.00% right"
    report.save_pictures(tmp_path / "a.pt", HISTORY, LABELS, PREDICTIONS, names, quiet=True)
    for name in ("curves", "confusion_matrix"):
        assert (tmp_path / f"a_{name}.png").stat().st_size > 9000
