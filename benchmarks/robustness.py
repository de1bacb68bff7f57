"""How far to trust the probabilities, and what changed images do to the accuracy.

    python benchmarks/robustness.py [CHECKPOINTS]    of the shipped model, or of others

The expected calibration error is that of Guo et al. 2017 (arXiv 1706.04599), with 15 bins.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import results
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import dataset
import train
from model import load_checkpoint


def rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each image by 15 degrees, one way or the other."""
    is_clockwise = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    turn = partial(transforms.rotate, images, interpolation=InterpolationMode.BILINEAR)
    return torch.where(is_clockwise, turn(-15), turn(15))


def add_noise(images: Tensor, generator: torch.Generator, deviation: float) -> Tensor:
    """Add Gaussian noise; a standard deviation of 1 is white."""
    noise = torch.randn(images.shape, generator=generator) * deviation * 255
    return (images + noise).round().clamp(0, 255).byte()


def fill_square(images: Tensor, generator: torch.Generator, side: int, outside: int = 0) -> Tensor:
    """Set a square at a random place of each image (N, 1, 28, 28) to 0.

    Up to `outside` of its rows and columns may lie outside of the image.
    """
    size, device = images.shape[-1], images.device
    options = dict(generator=generator, device=device)
    last = size - side + outside
    top, left = torch.randint(-outside, last + 1, (2, len(images), 1, 1, 1), **options)
    place = torch.arange(size, device=device)
    rows = (place[:, None] - top) // side == 0
    columns = (place - left) // side == 0
    return images.masked_fill(rows & columns, 0)


CHANGES = dict(
    shifted=partial(dataset.random_shift, pixels=3),
    rotated=rotate,
    noise_01=partial(add_noise, deviation=0.1),
    noise_02=partial(add_noise, deviation=0.2),
    occluded=partial(fill_square, side=8),
)


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    images, labels = dataset.load(args.data_dir, train=False)
    for path in args.checkpoints:
        model, _ = load_checkpoint(path)
        probabilities = train.predict(model, images).softmax(dim=1)
        confidence, answers = probabilities.max(dim=1)
        row = dict(
            checkpoint=path,
            test_accuracy=(answers == labels).double().mean(),
            confidence=confidence.mean(),
            calibration_error=multiclass_calibration_error(probabilities, labels, num_classes=10),
        )
        for name, change in CHANGES.items():
            changed = change(images, torch.Generator().manual_seed(0))
            right = train.predict(model, changed).argmax(dim=1) == labels
            row[name] = right.double().mean()
        yield row


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("checkpoints", nargs="*", default=["checkpoints/shipped/model.pt"])
    results.run(parser, measure, ("checkpoint",))


if __name__ == "__main__":
    main()
