"""How far an image is from what a model was trained on, and which of it is most similar.

The first is after Lee et al. 2018 (arXiv 1807.03888), but with the last layer alone and the image
as it is. The second: Nguyen, Kim & Nguyen 2021 (arXiv 2105.14944).
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

import dataset
from common.files import UserError, checksum, whole_file
from explaining.explanation import Explanation, Similar
from model import HybridClassifier

SAMPLE = 2000  # images: enough for a covariance, and quick
FLAGGED = 0.015  # share of the images that set the limit beyond it; of new ones, about 2 %
Statistics = dict[str, torch.Tensor]  # the classes' `means` (K, C), `precision` (C, C), `limit` ()


@torch.no_grad()
def embed(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """The pooled tokens, float32 (N, C), of uint8 images (N, 1, 28, 28)."""
    return torch.cat([model.embed(dataset.normalize(chunk)) for chunk in images.split(100)])


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


def remember(path: Path, key: str, find: Callable[[], Statistics]) -> Statistics:
    """What `find` returns, kept in a file for as long as the key, a checksum, is the same."""
    with suppress(Exception):  # a missing or damaged file raises one of a dozen types
        found = torch.load(path, weights_only=True)
        if found.pop("checkpoint") == key:
            return found
    found = find()
    with suppress(RuntimeError), whole_file(path) as file:  # the folder may be read-only
        torch.save(dict(checkpoint=key, **found), file)
    return found


def training_split(
    path: Path, train_config: dict[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices, int64, of the images that a checkpoint was trained on, and that it held out."""
    names = ("val_size", "train_size", "seed")
    val_size, train_size, seed = (train_config.get(name, 0) for name in names)
    try:
        trained, held_out = dataset.split_indices(labels, val_size, seed)
        if train_size:
            trained = trained[dataset.split_indices(labels[trained], train_size, seed)[1]]
    except ValueError as error:
        raise UserError(f"{path} was trained on other images: give their --data-dir") from error
    return trained, held_out


def feature_statistics(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> Statistics:
    """What `measure` finds for the model of a checkpoint, kept beside it in NAME.features.pt.

    Images that training held out set the limit, or else a half of those it trained on.
    """

    def find() -> Statistics:
        images, labels = dataset.load(data_dir, train=True)
        trained, others = training_split(path, train_config, labels)
        if not len(others):
            trained, others = trained[: 2 * SAMPLE].chunk(2)
        return measure(model, images[trained], labels[trained], images[others])

    return remember(path.with_suffix(".features.pt"), checksum(path), find)


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


# ---- Similar training images ----


class TrainingImages(NamedTuple):
    """The training images as a model sees them."""

    images: torch.Tensor  # uint8 (N, 1, 28, 28)
    labels: torch.Tensor  # int64 (N,)
    tokens: torch.Tensor  # pooled, float16 (N, C)
    trained: torch.Tensor  # the indices of those that it was trained on, int64
    held_out: torch.Tensor  # and of those held out for validation


def load_training_images(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> TrainingImages:
    """The training images; their pooled tokens are kept beside a checkpoint, in NAME.similar.pt."""
    images, labels = dataset.load(data_dir, train=True)
    split = training_split(path, train_config, labels)

    def find() -> Statistics:
        words = f"looking at all {len(images):,} training images, once"
        chunks = tqdm(images.split(500), desc=words, leave=False)
        return dict(tokens=torch.cat([embed(model, chunk).half() for chunk in chunks]))

    key = checksum(path) + hashlib.sha256(images.numpy()).hexdigest()
    tokens = remember(path.with_suffix(".similar.pt"), key, find)["tokens"]
    return TrainingImages(images, labels, tokens, *split)


def nearest(
    tokens: torch.Tensor, known: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distances from tokens (N, C) to the nearest of (M, C), ascending; their places.

    Both are (N, count), or narrower if there are not that many.
    """
    known, count = known.float(), min(count, len(known))
    chunks = tokens.split(500)
    found = [torch.cdist(chunk, known).topk(count, largest=False) for chunk in chunks]
    distances, places = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(places)


def find_similar(
    model: HybridClassifier, explanations: list[Explanation], training: TrainingImages, count: int
) -> None:
    """Fill in the nearest images the model was trained on, of each image's likeliest two classes.

    Distances are between pooled tokens, from which the last layer takes its answer.
    """
    labels = training.labels[training.trained]
    for e in explanations:
        token = embed(model, torch.from_numpy(e.image)[None, None])
        for label in e.probabilities.argsort()[::-1][:2].tolist():
            members = training.trained[labels == label]
            (distances,), (places,) = nearest(token, training.tokens[members], count)
            index = members[places]
            images = training.images[index, 0].numpy()
            e.similar.append(Similar(label, index.tolist(), images, distances.tolist()))


def is_contradicted(
    model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor, training: TrainingImages
) -> torch.Tensor:
    """Whether the model and most of the three nearest images give the same other label.

    Of uint8 images (N, 1, 28, 28) with labels, int64 (N,), that the model was not trained on.
    """
    tokens = embed(model, images)
    answers = model.head(tokens).argmax(dim=1)
    places = nearest(tokens, training.tokens[training.trained], 3)[1]
    votes = training.labels[training.trained][places] == answers[:, None]
    return (answers != labels) & (votes.sum(dim=1) > 1)
