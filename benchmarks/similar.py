"""Whether similar training images expose errors: the shipped model, test split.

    python benchmarks/similar.py

As in `Visulization.py --similar`, an alarm is an answer whose second likeliest class has a nearer
training image. The control raises as many alarms, for the answers of lowest confidence. `exposed`
is the share of wrong answers under alarm, `false_alarms` that of right ones.
"""

import argparse
from collections.abc import Iterator

import results
import torch
from torch import Tensor

import dataset
from explaining.features import embed, load_training_images
from model import SHIPPED_CHECKPOINT, load_checkpoint


def distances_of_classes(points: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Distances (N, 10) from points (N, C) to the nearest known one (M, C) with each label."""
    found = []
    for k in range(len(dataset.CLASS_NAMES)):
        members = known[labels == k].float()
        found.append(torch.cdist(points, members).amin(dim=1))
    return torch.stack(found, dim=1)


def figures(probabilities: Tensor, distances: Tensor, labels: Tensor) -> results.Row:
    """The errors that distances (N, 10) expose, and those that probabilities (N, 10) do."""
    confidence, answers = probabilities.max(dim=1)
    first, second = distances.gather(1, probabilities.topk(2).indices).unbind(dim=1)
    alarm, is_wrong = second < first, answers != labels
    unsure = confidence.argsort()[: alarm.sum()]
    return dict(
        alarms=alarm.sum(),
        exposed=alarm[is_wrong].double().mean(),
        false_alarms=alarm[~is_wrong].double().mean(),
        exposed_by_confidence=is_wrong[unsure].sum() / is_wrong.sum(),
    )


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    path = SHIPPED_CHECKPOINT
    model, checkpoint = load_checkpoint(path)
    training = load_training_images(path, model, checkpoint["train_config"], args.data_dir)
    images, labels = dataset.load(args.data_dir, train=False)
    tokens = embed(model, images)
    probabilities = model.head(tokens).detach().softmax(dim=1)
    known_labels = training.labels[training.trained]
    distances = distances_of_classes(tokens, training.tokens, known_labels)
    row = dict(neighbour="of the two likeliest classes (--similar)")
    yield row | figures(probabilities, distances, labels)


def main() -> None:
    results.run(results.make_parser(__file__, __doc__), measure, ("neighbour",))


if __name__ == "__main__":
    main()
