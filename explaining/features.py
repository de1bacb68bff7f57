"""How far an image is from everything that a model was trained on.

After Lee et al. 2018 (arXiv 1807.03888). They combine several layers and perturb the image first;
here it is the last layer, and the image as it is.
"""

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

import dataset
from common.files import UserError, checksum, whole_file
from model import CheckpointError, HybridClassifier

SAMPLE = 2000  # images that are measured: enough for a covariance, and quick
FLAGGED = 0.015  # share of the images that set the limit beyond it; of new ones, about 2 %
Statistics = dict[str, torch.Tensor]


@torch.no_grad()
def embed(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """The pooled tokens, float32 (N, C), of uint8 images (N, 1, 28, 28)."""
    chunks = images.split(100)
    bar = tqdm(chunks, "features of training images", leave=False, disable=len(chunks) < 10)
    return torch.cat([model.embed(dataset.normalize(chunk)) for chunk in bar])


def distance(tokens: torch.Tensor, means: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    """The squared Mahalanobis distance (N,) of tokens (N, C) from the nearest mean (K, C)."""
    from_means = tokens[:, None] - means
    return torch.einsum("nkc,cd,nkd->nk", from_means, precision, from_means).amin(dim=1)


def measure(
    model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor, others: torch.Tensor
) -> Statistics:
    """The statistics of training images, and the distance beyond which an image is strange.

    Takes uint8 images (N, 1, 28, 28) with their labels, int64 (N,), and others that set the limit.
    Returns the classes' `means` (K, C), their common `precision` (C, C), and the `limit`.
    """
    known = images[:SAMPLE]
    tokens, others = embed(model, torch.cat([known, others[:SAMPLE]])).tensor_split([len(known)])
    if not tokens.isfinite().all():
        raise CheckpointError("the model's answer is not finite: use another checkpoint")
    classes, members = labels[:SAMPLE].unique(return_inverse=True)
    means = torch.stack([tokens[members == k].mean(dim=0) for k in range(len(classes))])
    covariance = LedoitWolf(assume_centered=True).fit((tokens - means[members]).numpy())
    precision = torch.from_numpy(covariance.precision_).float()
    limit = distance(others, means, precision).quantile(1 - FLAGGED)
    return dict(means=means, precision=precision, limit=limit)


def read_statistics(path: Path, checkpoint: str) -> Statistics | None:
    """What a file holds for a checkpoint of this checksum; None if it is stale or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # `torch.load` compares no checksums
                return None
        kept = torch.load(path, weights_only=True)
        is_fresh = kept.pop("checkpoint") == checkpoint
    except Exception:  # a damaged or foreign file raises one of a dozen types
        return None
    return kept if is_fresh else None


def feature_statistics(
    path: Path, model: HybridClassifier, train_config: dict[str, Any], data_dir: Path
) -> Statistics:
    """What `measure` finds for the model of a checkpoint, kept beside it in NAME.features.pt.

    The images that `train.load_data` held out set the limit, or else a half of those it trained on.
    A UserError if they are needed and Fashion-MNIST cannot be had.
    """
    kept = path.with_suffix(".features.pt")
    digest = checksum(path)
    statistics = read_statistics(kept, digest)
    if statistics:
        return statistics
    images, labels = dataset.load(data_dir, train=True)
    names = ("val_size", "train_size", "seed")
    val_size, train_size, seed = (train_config.get(name, 0) for name in names)
    try:
        trained, others = dataset.split_indices(labels, val_size, seed)
        if train_size:
            trained = trained[dataset.split_indices(labels[trained], train_size, seed)[1]]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not say which images it was trained on") from error
    if not len(others):
        trained, others = trained[: 2 * SAMPLE].chunk(2)
    statistics = measure(model, images[trained], labels[trained], images[others])
    buffer = io.BytesIO()
    torch.save(dict(checkpoint=digest, **statistics), buffer)
    with suppress(UserError), whole_file(kept) as file:  # the folder may be read-only
        file.write(buffer.getbuffer())
    return statistics


def familiarity_note(model: HybridClassifier, image: torch.Tensor, statistics: Statistics) -> str:
    """Why the answer for a uint8 image (1, 28, 28) may mean little; "" for a familiar image."""
    rotated = torch.stack([image.rot90(quarter, (1, 2)) for quarter in range(4)])
    distances = distance(embed(model, rotated), statistics["means"], statistics["precision"])
    distances /= statistics["limit"]
    if not distances[0] > 1:  # or not a number, after a run on a handful of images
        return ""
    if distances.min() < 0.5:
        ways = ("", "90 degrees to the left", "180 degrees", "90 degrees to the right")
        way = ways[distances.argmin()]
        return f"rotated by {way}, it would look more familiar to the model"
    return "the model has never seen anything like it"
