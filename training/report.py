"""What a run prints and draws: reports, the history, curves, the confusion matrix."""

import csv
import io
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import style
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, classification_report

from common.files import printable, whole_file
from dataset import CLASS_NAMES


def class_report(labels: torch.Tensor, predictions: torch.Tensor) -> str:
    """scikit-learn's classification report with the class names."""
    classes = range(len(CLASS_NAMES))
    options = dict(labels=classes, target_names=CLASS_NAMES, digits=4, zero_division=0)
    return classification_report(labels.cpu(), predictions.cpu(), **options)


def summary(
    split: str, logits: torch.Tensor, labels: torch.Tensor, quiet: bool
) -> dict[str, float]:
    """Cross-entropy and accuracy of logits (N, 10); unless quiet, prints the report by class."""
    predictions = logits.argmax(dim=1)
    if not quiet:
        print(f"\n{'train split, as augmented' if split == 'train' else f'{split} split'}")
        print(class_report(labels, predictions))
    loss = F.cross_entropy(logits, labels).item()
    return {
        f"{split}_loss": loss,
        f"{split}_accuracy": accuracy_score(labels.cpu(), predictions.cpu()),
    }


def epoch_line(history: Sequence[dict[str, float]], steps: Sequence[int]) -> str:
    """One line for the latest epoch; `steps` is the number of steps of every epoch of the run."""
    row, seconds = (
        history[-1],
        history[-1]["seconds"] - (history[-2]["seconds"] if len(history) > 1 else 0),
    )
    words = [f"epoch {len(history)}/{len(steps)}"]
    for split, name in (
        ("train", "train"),
        ("val", "val (averaged weights)"),
        ("test", "test (chooses nothing)"),
    ):
        if f"{split}_loss" in row:
            words.append(
                f"{name} loss {row[f'{split}_loss']:.4f} accuracy {row[f'{split}_accuracy']:.4f}"
            )
    words += [f"last lr {row['lr']:.3g}", f"{row['images'] / max(seconds, 0.01):.0f} images/s"]
    left = seconds * sum(steps[len(history) :]) / steps[len(history) - 1]
    elapsed, remaining = (timedelta(seconds=round(s)) for s in (row["seconds"], left))
    return "  ".join([*words, f"elapsed {elapsed}", f"remaining {remaining}"])


def write_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Write a table with a row for each epoch; the old file is replaced whole."""
    # they may come and go on --resume
    columns = dict.fromkeys(name for row in history for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), restval="")
    writer.writeheader()
    writer.writerows(history)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


@style.context("default")  # whatever a matplotlibrc of one's own says
def save_pictures(
    checkpoint: Path,
    history: Sequence[dict[str, float]],
    labels: torch.Tensor,
    predictions: torch.Tensor,
) -> None:
    """Draw a checkpoint's curves and its confusion matrix on the test split beside it."""
    pictures = {"curves": draw_curves(history)} if history else {}
    pictures["confusion_matrix"] = draw_confusion_matrix(labels, predictions)
    for name, figure in pictures.items():
        with whole_file(path := checkpoint.with_name(f"{checkpoint.stem}_{name}.png")) as file:
            figure.savefig(file, format="png", dpi=120)
        print(f"wrote {printable(path)}")


def draw_curves(history: Sequence[dict[str, float]]) -> Figure:
    """Cross-entropy, accuracy and learning rate over the epochs."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracies, lr = figure.subplots(1, 3)
    labels = dict(train="training (as augmented)", val="validation", test="test")
    for color, (split, label) in enumerate(labels.items()):
        for axes, name, scale in (
            (loss, f"{split}_loss", 1),
            (accuracies, f"{split}_accuracy", 100),
        ):
            points = [(row["epoch"], scale * row[name]) for row in history if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=label, color=f"C{color}")
    rates = [(row["epoch"], row["lr"]) for row in history if "lr" in row]
    if rates:
        lr.plot(*zip(*rates, strict=True), ".-", color="black")
    titles = ("cross-entropy", "accuracy (%)", "learning rate of the epoch's last step")
    for axes, title in zip((loss, accuracies, lr), titles, strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    loss.legend()
    accuracies.legend(loc="lower right")  # where no curve is
    return figure


def draw_confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor) -> Figure:
    """How many images of each class (rows) were taken for each class (columns)."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    options = dict(
        display_labels=CLASS_NAMES, cmap="Blues", colorbar=False, xticks_rotation=45, ax=axes
    )
    ConfusionMatrixDisplay.from_predictions(labels.cpu(), predictions.cpu(), **options)
    axes.set_title(f"test split: {accuracy_score(labels.cpu(), predictions.cpu()):.2%} right")
    return figure
