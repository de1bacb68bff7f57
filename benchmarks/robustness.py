"""How far to trust the probabilities, and what changed images do to the accuracy: the test split.

    python benchmarks/robustness.py                           the shipped model
    python benchmarks/robustness.py my/best.pt your/best.pt   a row for each

The expected calibration error (Guo et al. 2017, arXiv 1706.04599) is the mean distance between
confidence and accuracy, in 15 equal bins of confidence.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import dataset
import train
from model import load_checkpoint

SIDE = 8  # pixels of the black square, both ways
COLUMNS = dict(
    checkpoint=("", ""),
    test_accuracy=("accuracy", ".2%"),
    test_loss=("loss", ".4f"),
    confidence=("mean confidence", ".2%"),
    calibration_error=("expected calibration error", ".2%"),
    shifted=("shifted by up to 3 pixels", ".2%"),
    rotated=("rotated by 15 degrees", ".2%"),
    noise_01=("Gaussian noise, 0.1 of the range", ".2%"),
    noise_02=("Gaussian noise, 0.2 of the range", ".2%"),
    occluded=("a black square of 8x8", ".2%"),
)


def rotate(images: Tensor, generator: torch.Generator, degrees: float = 15) -> Tensor:
    """Rotate every image by `degrees`, one way or the other."""
    clockwise = torch.rand(len(images), generator=generator) < 0.5
    rotated = images.clone()
    for mask, angle in ((clockwise, -degrees), (~clockwise, degrees)):
        rotated[mask] = transforms.rotate(images[mask], angle, InterpolationMode.BILINEAR)
    return rotated


def add_noise(images: Tensor, generator: torch.Generator, deviation: float) -> Tensor:
    """Add Gaussian noise; its standard deviation is a fraction of the brightest value."""
    noise = torch.randn(images.shape, generator=generator) * deviation * 255
    return (images + noise).round().clamp(0, 255).byte()


def occlude(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blacken a square of 8x8 pixels at a random place of each image."""
    n, _, height, width = images.shape
    top = torch.randint(0, height - SIDE + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(0, width - SIDE + 1, (n, 1, 1, 1), generator=generator)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    inside = (y >= top) & (y < top + SIDE) & (x >= left) & (x < left + SIDE)
    return images.masked_fill(inside, 0)


CHANGES = dict(
    shifted=partial(dataset.random_shift, pixels=3),
    rotated=rotate,
    noise_01=partial(add_noise, deviation=0.1),
    noise_02=partial(add_noise, deviation=0.2),
    occluded=occlude,
)


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> results.Row:
    """The figures of a model: uint8 images (N, 1, 28, 28), labels int64 (N,)."""
    logits = train.predict(model, images)
    probabilities = logits.softmax(dim=1)
    error = multiclass_calibration_error(probabilities, labels, num_classes=10, n_bins=15)
    figures = dict(
        test_accuracy=(logits.argmax(dim=1) == labels).double().mean(),
        test_loss=F.cross_entropy(logits, labels),
        confidence=probabilities.amax(dim=1).mean(),
        calibration_error=error,
    )
    for name, change in CHANGES.items():
        changed = change(images, torch.Generator().manual_seed(0))
        right = train.predict(model, changed).argmax(dim=1) == labels
        figures[name] = right.double().mean()
    return {name: figure.item() for name, figure in figures.items()}


def measure_all(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each checkpoint."""
    images, labels = dataset.load(args.data_dir, train=False)
    for path in args.checkpoints:
        model, _ = load_checkpoint(path)
        yield dict(checkpoint=path) | measure(model, images, labels)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("checkpoints", nargs="*", default=["checkpoints/shipped/model.pt"])
    results.run(parser, measure_all, ("checkpoint",), COLUMNS)


if __name__ == "__main__":
    main()
