"""How far an image is from everything that a model was trained on.

After Lee et al. 2018 (arXiv 1807.03888), but with the last layer alone and the image as it is.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sklearn.covariance import LedoitWolf

import dataset
from common.files import UserError, checksum, whole_file
from explaining.photo import image_of
from model import HybridClassifier, check_classes

SAMPLE = 2000  # images: enough for a covariance, and quick
FLAGGED = 0.015  # share of the images that set the limit beyond it; of new ones, about 2 %
Statistics = dict[str, torch.Tensor]  # the classes' `means` (K, C), `precision` (C, C), `limit` ()


@torch.no_grad()
def embed(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """The pooled tokens, float32 (N, C), of uint8 images (N, 1, 28, 28)."""
    chunks = images.split(100)
    return torch.cat([model.embed(dataset.normalize(chunk, model.data)) for chunk in chunks])


def distance(model: HybridClassifier, images: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Squared Mahalanobis distances (N,) of images from the nearest class's mean."""
    from_means = embed(model, images)[:, None] - statistics["means"]
    squares = torch.einsum("nkc,cd,nkd->nk", from_means, statistics["precision"], from_means)
    return squares.amin(dim=1)


def measure(
    model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor, others: torch.Tensor
) -> Statistics:
    """The statistics of uint8 images (N, 1, 28, 28) with labels, int64 (N,).

    `limit` is the distance beyond which an image is strange; the others set it.
    """
    tokens = embed(model, images[:SAMPLE])
    classes, members = labels[:SAMPLE].unique(return_inverse=True)
    means = torch.stack([tokens[members == k].mean(dim=0) for k in range(len(classes))])
    covariance = LedoitWolf(assume_centered=True).fit((tokens - means[members]).numpy())
    statistics = dict(means=means, precision=torch.from_numpy(covariance.precision_).float())
    statistics["limit"] = distance(model, others[:SAMPLE], statistics).quantile(1 - FLAGGED)
    return statistics


def feature_statistics(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> Statistics:
    """What `measure` finds for the model of a checkpoint, kept beside it in NAME.features.pt.

    Images that training held out set the limit, or else a half of those it trained on.
    """
    kept, digest = path.with_suffix(".features.pt"), checksum(path)
    with suppress(Exception):  # a missing or damaged file raises one of a dozen types
        statistics = torch.load(kept, weights_only=True)
        if statistics.pop("checkpoint") == digest:
            return statistics
    check_classes(path, model, data_dir)
    images, labels = dataset.load(data_dir, train=True, read_image=image_of)
    names = ("val_size", "train_size", "seed")
    val_size, train_size, seed = (train_config.get(name, 0) for name in names)
    try:
        trained, others = dataset.split_indices(labels, val_size, seed)
        if train_size:
            trained = trained[dataset.split_indices(labels[trained], train_size, seed)[1]]
    except ValueError as error:
        raise UserError(f"{path} was trained on other images: give their --data-dir") from error
    if not len(others):
        trained, others = trained[: 2 * SAMPLE].chunk(2)
    statistics = measure(model, images[trained], labels[trained], images[others])
    with suppress(RuntimeError), whole_file(kept) as file:  # the folder may be read-only
        torch.save(dict(checkpoint=digest, **statistics), file)
    return statistics


def familiarity_note(model: HybridClassifier, image: torch.Tensor, statistics: Statistics) -> str:
    """Why the answer for a uint8 image (1, 28, 28) may mean little; "" for a familiar image."""
    rotated = torch.stack([image.rot90(quarter, (1, 2)) for quarter in range(4)])
    distances = distance(model, rotated, statistics) / statistics["limit"]
    if not distances[0] > 1:  # or not a number, after a run on a handful of images
        return ""
    if distances.min() < 0.5:
        ways = ("", "90 degrees to the left", "180 degrees", "90 degrees to the right")
        return f"rotated by {ways[distances.argmin()]}, it would look more familiar to the model"
    return "the model has never seen anything like it"
