"""How far an image is from everything that a model was trained on, and what is most similar.

After Lee et al. 2018 (arXiv 1807.03888), but with the last layer alone and the image as it is.
Similar images help people more than maps (Nguyen, Kim & Nguyen 2021, arXiv 2105.14944).
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

import dataset
from common.files import UserError, checksum, whole_file
from explaining.explanation import Explanation
from explaining.photo import image_of
from explaining.sheets import Cell
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


def remember(path: Path, key: str, find: Callable[[], Statistics]) -> Statistics:
    """What `find` returns, kept in a file until the key, a checksum, is another."""
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
        check_classes(path, model, data_dir)
        images, labels = dataset.load(data_dir, train=True, read_image=image_of)
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
    """The training images, and what a model makes of those that it was trained on."""

    images: torch.Tensor  # uint8 (N, 1, 28, 28)
    labels: torch.Tensor  # int64 (N,)
    trained: torch.Tensor  # the indices of those, int64 (M,)
    held_out: torch.Tensor  # and of others, for validation
    tokens: torch.Tensor  # pooled, float16 (M, C)


def load_training_images(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> TrainingImages:
    """Their pooled tokens are kept beside the checkpoint, in NAME.similar.pt."""
    check_classes(path, model, data_dir)
    images, labels = dataset.load(data_dir, train=True, read_image=image_of)
    trained, held_out = training_split(path, train_config, labels)

    def find() -> Statistics:
        chunks = tqdm(images[trained].split(500), "once: training images", leave=False)
        return dict(tokens=torch.cat([embed(model, chunk).half() for chunk in chunks]))

    key = checksum(path) + hashlib.sha256(images.numpy()).hexdigest()
    tokens = remember(path.with_suffix(".similar.pt"), key, find)["tokens"]
    return TrainingImages(images, labels, trained, held_out, tokens)


def similar_images(
    model: HybridClassifier, e: Explanation, training: TrainingImages, count: int
) -> list[Cell]:
    """The nearest images that the model was trained on, of its likeliest two classes.

    By Euclidean distance of pooled tokens. A class nearer than the predicted one is red.
    """
    token, labels = embed(model, torch.from_numpy(e.image)[None, None]), training.labels
    cells, limit = [], 0.0
    for k in e.probabilities.argsort()[::-1][:2]:
        members = labels[training.trained] == int(k)
        distances = torch.cdist(token, training.tokens[members].float())[0]
        distances, places = distances.sort()
        images = training.images[training.trained[members][places[:count]], 0].numpy()
        words = [f"{distance:.2f}" for distance in distances[:count]]
        color = "crimson" if distances[0] < limit else "black"
        caption = f"nearest training images\nlabelled {e.class_names[k]}"
        cells.append(Cell([[image] for image in images], caption, words, color))
        limit = distances[0]
    return cells


def labels_of_nearest(tokens: torch.Tensor, training: TrainingImages) -> torch.Tensor:
    """What most of the three nearest images are labelled, int64 (N,), of pooled tokens (N, C)."""
    vote = KNeighborsClassifier(3, algorithm="brute")
    vote.fit(training.tokens.float(), training.labels[training.trained])
    return torch.from_numpy(vote.predict(tokens))
