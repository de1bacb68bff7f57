"""Whether the nearest training image exposes errors: the shipped model, test split.

    python benchmarks/similar.py

An alarm is a nearest image whose label is not the model's answer. The control raises as many: for
the answers of lowest confidence.
"""

import argparse
from collections.abc import Iterator

import results
import torch
from torch import Tensor

import dataset
from explaining.features import embed, load_training_images
from model import SHIPPED_CHECKPOINT, load_checkpoint

COLUMNS = dict(
    neighbour=("nearest training image", ""),
    right=("its label is right", ".2%"),
    model_right=("the model is right", ".2%"),
    alarms=("alarms", ""),
    exposed=("errors exposed", ".1%"),
    false_alarms=("right answers under alarm", ".2%"),
    exposed_by_confidence=("errors exposed by lowest confidence", ".1%"),
)


def distances_of_classes(points: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Distances (N, 10) from points (N, C) to the nearest known one (M, C) with each label."""
    columns = []
    for k in range(len(dataset.CLASS_NAMES)):
        members = known[labels == k].float()
        chunks = points.split(500)
        columns.append(torch.cat([torch.cdist(chunk, members).amin(dim=1) for chunk in chunks]))
    return torch.stack(columns, dim=1)


def figures(neighbours: Tensor, probabilities: Tensor, labels: Tensor) -> results.Row:
    """What the labels of the nearest images, int64 (N,), say of a model's answers."""
    confidence, answers = probabilities.max(dim=1)
    is_right, alarm = answers == labels, neighbours != answers
    by_confidence = confidence.argsort()[: alarm.sum()]
    row = dict(
        right=(neighbours == labels).double().mean(),
        model_right=is_right.double().mean(),
        alarms=alarm.sum(),
        exposed=alarm[~is_right].double().mean(),
        false_alarms=alarm[is_right].double().mean(),
        exposed_by_confidence=(~is_right[by_confidence]).sum() / (~is_right).sum(),
    )
    return {name: figure.item() for name, figure in row.items()}


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each kind of neighbour."""
    path = SHIPPED_CHECKPOINT
    model, checkpoint = load_checkpoint(path)
    training = load_training_images(path, model, checkpoint["train_config"], args.data_dir)
    known_labels = training.labels[training.trained]
    images, labels = dataset.load(args.data_dir, train=False)
    tokens = embed(model, images)
    probabilities = model.head(tokens).detach().softmax(dim=1)
    likeliest = probabilities.topk(2).indices

    found = distances_of_classes(tokens, training.tokens, known_labels)
    of_two = likeliest.gather(1, found.gather(1, likeliest).argmin(dim=1, keepdim=True))[:, 0]
    neighbours = {
        "of all": found.argmin(dim=1),
        "of the two likeliest classes (--similar)": of_two,
    }
    for name, nearest_labels in neighbours.items():
        yield dict(neighbour=name) | figures(nearest_labels, probabilities, labels)


def main() -> None:
    results.run(results.make_parser(__file__, __doc__), measure, ("neighbour",), COLUMNS)


if __name__ == "__main__":
    main()
