"""What a run prints and draws: reports, the history, curves, the confusion matrix."""

import csv
import io
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.nn.functional as F
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay, classification_report
from torch import Tensor

from common.files import printable, whole_file

Row = dict[str, float]  # the numbers of an epoch
SPLITS = dict(
    train="train split, as augmented",
    val="val split",
    test="test split",
)


def class_report(labels: Tensor, predictions: Tensor, names: Sequence[str]) -> str:
    """scikit-learn's classification report with the class names."""
    options = dict(labels=range(len(names)), target_names=names, zero_division=0)
    return classification_report(labels.cpu(), predictions.cpu(), digits=4, **options)


def summary(split: str, logits: Tensor, labels: Tensor, names: Sequence[str], quiet: bool) -> Row:
    """Cross-entropy and accuracy of logits (N, 10); unless quiet, prints a report."""
    predictions = logits.argmax(dim=1)
    if not quiet:
        print(f"\n{SPLITS[split]}")
        print(class_report(labels, predictions, names))
    return {
        f"{split}_loss": F.cross_entropy(logits, labels).item(),
        f"{split}_accuracy": (predictions == labels).sum().item() / len(labels),
    }


def epoch_line(history: list[Row], steps: list[int]) -> str:
    """One line for the latest epoch; `steps` are the numbers of steps of all epochs."""
    done, row = len(history), history[-1]
    seconds = row["seconds"]
    if done > 1:
        seconds -= history[-2]["seconds"]
    words = [f"epoch {done}/{len(steps)}"]
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        if name in row:
            words.append(f"{name} {row[name]:.4f}")
    elapsed = timedelta(seconds=round(row["seconds"]))
    remaining = timedelta(seconds=round(seconds * sum(steps[done:]) / steps[done - 1]))
    words.append(f"{row['images'] / max(seconds, 0.01):.0f} images/s")
    words.append(f"elapsed {elapsed}  remaining {remaining}")
    return "  ".join(words)


def write_history(history: list[Row], path: Path) -> None:
    """Write a table with a row for each epoch."""
    columns = dict.fromkeys(name for row in history for name in row)  # a resumed run may add some
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(history)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


@style.context(["default", {"text.parse_math": False}])  # not a person's; a name may hold a $
def save_pictures(
    checkpoint: Path,
    history: list[Row],
    labels: Tensor,
    predictions: Tensor,
    names: Sequence[str],
    quiet: bool,
) -> None:
    """Draw curves and confusion matrix beside a checkpoint."""
    accuracy = (predictions == labels).double().mean().item()
    pictures = dict(
        curves=draw_curves(history, accuracy),
        confusion_matrix=draw_confusion_matrix(labels, predictions, names),
    )
    for name, figure in pictures.items():
        path = checkpoint.with_name(f"{checkpoint.stem}_{name}.png")
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=120)
        if not quiet:
            print(f"wrote {printable(path)}")


def draw_curves(history: list[Row], test_accuracy: float) -> Figure:
    """Cross-entropy, accuracy and learning rate over the epochs."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = {
        "cross-entropy": ("train_loss", "val_loss"),
        "accuracy": ("train_accuracy", "val_accuracy"),
        "learning rate of the last step": ("lr",),
    }
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if name in row]
            if points:
                label = SPLITS.get(name.split("_")[0], name)
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
        if title == "accuracy":
            label = f"{SPLITS['test']}: {test_accuracy:.4f}"
            axes.axhline(test_accuracy, color="black", linestyle="--", linewidth=1, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        # below, where it covers no point
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return figure


def draw_confusion_matrix(labels: Tensor, predictions: Tensor, names: Sequence[str]) -> Figure:
    """How many images of each class (rows) were taken for each class (columns)."""
    side = max(7, 0.5 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    options = dict(cmap="Blues", colorbar=False, xticks_rotation=45, ax=axes)
    options |= dict(labels=range(len(names)), display_labels=names)
    ConfusionMatrixDisplay.from_predictions(labels, predictions, **options)
    axes.set_title(f"test split: {(predictions == labels).double().mean():.2%} right")
    return figure
