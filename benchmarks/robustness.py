"""How far to trust the probabilities, and what changed images do to the accuracy: the test split, plain and changed.

    python benchmarks/robustness.py                                              the shipped model
    python benchmarks/robustness.py checkpoints/shipped/model.pt my/best.pt      a column for each checkpoint

The expected calibration error (Guo et al. 2017, arXiv 1706.04599) is the mean distance between confidence and accuracy,
in 15 equal bins of confidence; 0 is best. Every change is drawn anew for every image from the seed, the same for all
models. Nothing here is used to choose anything.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import train
from model import load_checkpoint
from training.processes import set_threads

OCCLUSION = 8  # pixels, both ways


def rotate(images: torch.Tensor, generator: torch.Generator, degrees: float = 15) -> torch.Tensor:
    """Turn every image by `degrees`, one way or the other."""
    clockwise = torch.rand(len(images), generator=generator) < 0.5
    turned = images.clone()
    for mask, angle in ((clockwise, -degrees), (~clockwise, degrees)):
        turned[mask] = transforms.rotate(images[mask], angle, interpolation=InterpolationMode.BILINEAR)
    return turned


def add_noise(images: torch.Tensor, generator: torch.Generator, deviation: float) -> torch.Tensor:
    """Add Gaussian noise; its deviation is a part of the brightest value."""
    noise = torch.randn(images.shape, generator=generator) * deviation * 255
    return (images + noise).round().clamp(0, 255).byte()


def occlude(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blacken a square of 8x8 pixels at a random place of each image."""
    n, _, height, width = images.shape
    top = torch.randint(0, height - OCCLUSION + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(0, width - OCCLUSION + 1, (n, 1, 1, 1), generator=generator)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    inside = (y >= top) & (y < top + OCCLUSION) & (x >= left) & (x < left + OCCLUSION)
    return images.masked_fill(inside, 0)


CHANGES: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "as they are": lambda images, g: images,
    "shifted by up to 3 pixels each way": lambda images, g: dataset.augment(images, g, flip=False, shift=3, erase=0),
    "turned by 15 degrees": rotate,
    "Gaussian noise, deviation 0.1 of the range": lambda images, g: add_noise(images, g, 0.1),
    "Gaussian noise, deviation 0.2 of the range": lambda images, g: add_noise(images, g, 0.2),
    "a black square of 8x8 pixels": occlude,
}


def measure(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, str]:
    """The figures of one model, as text: accuracy under each change, and the quality of its probabilities."""
    figures = {}
    for name, change in CHANGES.items():
        logits = train.predict(model, change(images, torch.Generator().manual_seed(seed)))
        figures[f"accuracy, test images {name}"] = f"{(logits.argmax(dim=1) == labels).double().mean().item():.2%}"
        if name == "as they are":
            probabilities = logits.softmax(dim=1)
            error = multiclass_calibration_error(probabilities, labels, num_classes=10, n_bins=15, norm="l1").item()
            figures |= {
                "negative log-likelihood": f"{F.cross_entropy(logits, labels).item():.4f}",
                "mean confidence": f"{probabilities.amax(dim=1).mean().item():.2%}",
                "expected calibration error": f"{error:.2%}",
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", default=["checkpoints/shipped/model.pt"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_threads()
    images, labels = dataset.load(args.data_dir, train=False)
    columns = [measure(load_checkpoint(path)[0], images, labels, args.seed) for path in args.checkpoints]
    print("| | " + " | ".join(args.checkpoints) + " |\n|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
