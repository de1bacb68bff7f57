"""Heatmaps where the right answer is known: a mark of 4x4 pixels alone decides the class.

    python benchmarks/ground_truth.py    train the model of the marks, some minutes, and measure

On every image, one of ten marks is planted at a random place, and the class is the mark's number.
Measured is the share of a map's evidence that lies on the mark (after Yang & Kim 2019, arXiv
1907.09701), and within two pixels, as a place of a coarse layer is larger than the mark.

With two marks, and `versus`, it is the share of all evidence, for and against, that is on the mark
with the right sign, and with the wrong one.
"""

import argparse
import itertools
from collections.abc import Iterator

import results
import torch
import torch.nn.functional as F
from faithfulness import baseline_maps, cam_maps, method_name
from peers import RECIPE
from torch import Tensor

import dataset
import train
from gradcam import METHODS, GradCAM
from model import HybridClassifier
from Visulization import default_layers

SIDE = 4  # pixels of a mark, both ways
COLUMNS = dict(
    marks=("marks", ""),
    heatmap=("heatmap", ""),
    on_mark=("on the mark", ".1%"),
    near_mark=("within 2 pixels", ".1%"),
    hottest=("hottest pixel on it", ".1%"),
    wrong_sign=("wrong sign", ".1%"),
)


def make_marks(generator: torch.Generator) -> Tensor:
    """Ten patterns, uint8 (10, 4, 4), of eight white and eight black pixels: equally bright."""
    noise = torch.rand(len(dataset.CLASS_NAMES), SIDE**2, generator=generator)
    white = noise.argsort(dim=1) < SIDE**2 // 2
    return (255 * white).byte().view(-1, SIDE, SIDE)


def plant(images: Tensor, marks: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of uint8 images (N, 1, 28, 28) with their labels' marks at `places`, top and left.

    Also returns where the marks are, bool (N, 28, 28).
    """
    rows = places[:, 0, None, None] + torch.arange(SIDE)[:, None]
    columns = places[:, 1, None, None] + torch.arange(SIDE)
    image = torch.arange(len(images))[:, None, None]
    images, mask = images.clone(), torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    images[image, 0, rows, columns] = marks[labels]
    mask[image, rows, columns] = True
    return images, mask


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels, int64 (N,), and places of their marks, int64 (N, 2), all equally likely."""
    labels = torch.randint(0, len(dataset.CLASS_NAMES), (n,), generator=generator)
    places = torch.randint(0, dataset.IMAGE_SIZE - SIDE + 1, (n, 2), generator=generator)
    return labels, places


def share_on(maps: Tensor, mask: Tensor) -> float:
    """The mean share of maps (N, 28, 28) that is on a mask, bool (N, 28, 28); empty maps: 0."""
    totals = maps.sum(dim=(1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
    return ((maps * mask).sum(dim=(1, 2)) / totals).mean().item()


def candidates(model: HybridClassifier, methods: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Methods and layers: the stem's stage ends, the encoder's blocks, and the default layers."""
    layers = [*model.stage_ends(), *(f"blocks.{i}" for i in range(len(model.blocks)))]
    chosen = [*((layer,) for layer in layers), tuple(default_layers(model))]
    return list(itertools.product(methods, chosen))


def one_mark(
    model: HybridClassifier, images: Tensor, mask: Tensor, labels: Tensor
) -> Iterator[results.Row]:
    """The rows of images with one mark each, best first."""
    near = F.max_pool2d(mask.float(), 5, stride=1, padding=2).bool()
    maps = dict(baseline_maps(model, images, labels))
    maps["chance"] = torch.ones(mask.shape)
    for method, layers in candidates(model, list(METHODS)):
        maps[method_name(method, layers)] = cam_maps(model, layers, method, images, labels)
    for name, heat in sorted(maps.items(), key=lambda item: -share_on(item[1], mask)):
        places = heat.flatten(1).argmax(dim=1, keepdim=True)
        yield dict(
            marks="one",
            heatmap=name,
            on_mark=share_on(heat, mask),
            near_mark=share_on(heat, near),
            hottest=mask.flatten(1).gather(1, places).double().mean().item(),
        )


def two_marks(
    model: HybridClassifier, images: Tensor, masks: list, labels: list
) -> Iterator[results.Row]:
    """The rows of images with two marks each, for the first mark's class against the second's."""
    one, other = masks
    for method, layers in candidates(model, ["gradcam", "hirescam"]):
        with GradCAM(model, layers, method) as cam:
            maps = cam(dataset.normalize(images), *labels, normalize=False)
        up, down = maps.relu(), (-maps).relu()
        right = (up * one + down * other).sum(dim=(1, 2)).mean().item()
        wrong = (up * other + down * one).sum(dim=(1, 2)).mean().item()
        yield dict(
            marks="two", heatmap=method_name(method, layers), on_mark=right, wrong_sign=wrong
        )


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """Train the model of the marks, and measure on test images that it is right on."""
    generator = torch.Generator().manual_seed(0)
    marks = make_marks(generator)
    changes = RECIPE | dict(flip=False, shift=0, erase=0.0)  # nothing that moves or hides marks
    changes |= dict(epochs=args.epochs, val_size=0, data_dir=args.data_dir, device="cpu")
    run = train.start_run(results.settings(**changes))
    labels, places = draw(len(run.images), generator)
    run.images, _ = plant(run.images, marks, labels, places)
    run.labels = labels
    for epoch in range(args.epochs):
        train.train_epoch(run, epoch)
    model = run.ema

    images = dataset.load(args.data_dir, train=False)[0]
    labels, places = draw(len(images), generator)
    planted, mask = plant(images, marks, labels, places)
    right = train.predict(model, planted).argmax(dim=1) == labels
    print(f"right on {right.double().mean().item():.2%} of the test images with one mark\n")
    index = right.nonzero().flatten()[: args.num_images]
    yield from one_mark(model, planted[index], mask[index], labels[index])

    others, other_places = draw(len(images), generator)
    apart = ((places - other_places).abs().amax(dim=1) >= 2 * SIDE) & (labels != others)
    planted, other_mask = plant(planted, marks, others, other_places)
    i = apart.nonzero().flatten()[: args.num_images]
    yield from two_marks(model, planted[i], [mask[i], other_mask[i]], [labels[i], others[i]])


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=1000)
    results.run(parser, measure, ("marks", "heatmap"), COLUMNS)


if __name__ == "__main__":
    main()
