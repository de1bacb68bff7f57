"""The training images that are most similar to an image, by what a model makes of them.

They help people more than maps (Nguyen, Kim & Nguyen 2021, arXiv 2105.14944).
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import dataset
from common.files import UserError, checksum, whole_file
from explaining.explanation import Explanation
from explaining.photo import image_of
from explaining.sheets import Cell
from model import HybridClassifier, check_classes


@torch.no_grad()
def embed(model: HybridClassifier, images: Tensor) -> Tensor:
    """The pooled tokens, float32 (N, C), of uint8 images (N, 1, 28, 28)."""
    chunks = images.split(100)
    return torch.cat([model.embed(dataset.normalize(chunk, model.data)) for chunk in chunks])


class TrainingImages(NamedTuple):
    """The training images, and what a model makes of those that it was trained on."""

    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # int64 (N,)
    trained: Tensor  # the indices of those, int64 (M,)
    held_out: Tensor  # and of others, for validation
    tokens: Tensor  # pooled, float16 (M, C)


def load_training_images(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> TrainingImages:
    """Read or make them; NAME.similar.pt beside the checkpoint keeps tokens for the next time."""
    check_classes(path, model, data_dir)
    images, labels = dataset.load(data_dir, train=True, read_image=image_of)
    settings = {name: train_config.get(name, 0) for name in ("val_size", "seed", "train_size")}
    try:
        trained, held_out = dataset.split_indices(labels, **settings)
    except ValueError as error:
        raise UserError(f"{path} was trained on other images: give their --data-dir") from error
    source = checksum(path) + hashlib.sha256(images.numpy()).hexdigest()
    place = path.with_suffix(".similar.pt")
    tokens = None
    with suppress(Exception):  # of a dozen types, if the file is missing, damaged or foreign
        tokens = torch.load(place, weights_only=True)[source]
    if tokens is None:
        chunks = tqdm(images[trained].split(500), "once: training images", leave=False)
        tokens = torch.cat([embed(model, chunk).half() for chunk in chunks])
        with suppress(RuntimeError), whole_file(place) as file:  # the folder may be read-only
            torch.save({source: tokens}, file)
    return TrainingImages(images, labels, trained, held_out, tokens)


def similar_images(
    model: HybridClassifier,
    e: Explanation,
    training: TrainingImages,
    count: int,
    of_label: bool = False,
) -> list[Cell]:
    """The nearest images that the model was trained on, of its likeliest two classes.

    By Euclidean distance of pooled tokens. A class nearer than the predicted one is red. For a
    label in doubt, `of_label` takes its class in place of the second.
    """
    token = embed(model, torch.from_numpy(e.image)[None, None])
    labels = training.labels[training.trained]
    classes = sorted(labels.unique().tolist(), key=lambda k: -e.probabilities[k])[:2]
    if of_label:
        classes[1] = e.label
    cells = []
    nearest = 0.0  # the distance of the class before
    for k in classes:
        members = labels == k
        distances = torch.cdist(token, training.tokens[members].float())[0]
        distances, order = distances.sort()
        index = training.trained[members][order[:count]]
        panels = [[image] for image in training.images[index, 0].numpy()]
        words = [f"{distance:.2f}" for distance in distances[:count]]
        color = "crimson" if distances[0] < nearest else "black"
        caption = f"nearest training images\nlabelled {e.class_names[k]}"
        cells.append(Cell(panels, caption, words, color))
        nearest = distances[0]
    return cells


def labels_of_nearest(tokens: Tensor, training: TrainingImages) -> Tensor:
    """What most of the three nearest images are labelled, int64 (N,), of pooled tokens (N, C)."""
    from sklearn.neighbors import KNeighborsClassifier  # takes a second to load

    vote = KNeighborsClassifier(3, algorithm="brute")
    vote.fit(training.tokens.float(), training.labels[training.trained])
    return torch.from_numpy(vote.predict(tokens))
