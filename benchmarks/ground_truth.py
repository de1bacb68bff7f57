"""Heatmaps where the right answer is known: a mark of 4x4 pixels alone decides the class. Is the evidence on the mark?

    python benchmarks/ground_truth.py                 train the model of the marks, a few minutes, and print both tables

On every image of the data set, whatever garment it shows, one of ten marks is planted at a random place, and the class
is the mark's number. A model that is right on nearly all test images can only have looked at the mark. The tables say
what share of a map's evidence lies on the mark, by layer and method, against chance and simple baselines.

- one mark: the share of the map on the mark, the share within two pixels around it (a place of a coarse layer is larger
  than the mark), and how often the hottest pixel is on the mark.
- two marks, `versus`: the map of the one class against the other. The share of all evidence, for and against, that is
  on the mark with the right sign, and with the wrong one. Finer-CAM (Zhang et al. 2025, arXiv 2501.11309) keeps what is
  for the class alone; here, on Grad-CAM (its default) and against one class of weight 1: the signed map, cut off at 0.

The idea is from Yang & Kim 2019, "Benchmarking Attribution Methods with Relative Feature Importance", arXiv 1907.09701.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import step_time
from faithfulness import BATCH_SIZE, baseline_maps, cam_maps, method_name
from peers import RECIPE, fit

import dataset
import train
from gradcam import METHODS, GradCAM
from model import HybridClassifier
from training import processes
from Visulization import METHOD, default_layers

SIDE = 4  # pixels of a mark, both ways


def make_marks(generator: torch.Generator) -> torch.Tensor:
    """Ten patterns, uint8 (10, 4, 4), each of eight white and eight black pixels, so that brightness tells nothing."""
    white = torch.rand(len(dataset.CLASS_NAMES), SIDE**2, generator=generator).argsort(dim=1) < SIDE**2 // 2
    return (255 * white).byte().view(-1, SIDE, SIDE)


def plant(
    images: torch.Tensor, marks: torch.Tensor, labels: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of uint8 images (N, 1, 28, 28) with the marks of their labels at `places`, int64 (N, 2), top and left.

    Also returns where the marks are, bool (N, 28, 28).
    """
    rows = places[:, 0, None, None] + torch.arange(SIDE)[:, None]
    columns = places[:, 1, None, None] + torch.arange(SIDE)
    image = torch.arange(len(images))[:, None, None]
    images, mask = images.clone(), torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    images[image, 0, rows, columns] = marks[labels]
    mask[image, rows, columns] = True
    return images, mask


def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, int64 (N,), and places of their marks, int64 (N, 2), all equally likely."""
    labels = torch.randint(0, len(dataset.CLASS_NAMES), (n,), generator=generator)
    return labels, torch.randint(0, dataset.IMAGE_SIZE - SIDE + 1, (n, 2), generator=generator)


def share_on(maps: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean share of maps (N, 28, 28), never negative, that is where a mask, bool (N, 28, 28), is; empty maps: 0."""
    totals = maps.sum(dim=(1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
    return ((maps * mask).sum(dim=(1, 2)) / totals).mean().item()


def candidates(model: HybridClassifier, methods: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The stem's stage ends and the encoder's blocks with every method, and the default layers together."""
    layers = [*model.stage_ends(), *(f"blocks.{i}" for i in range(len(model.blocks)))]
    chosen = [(layer,) for layer in layers] + [tuple(default_layers(model))]
    return list(itertools.product(methods, chosen))


def one_mark(model: HybridClassifier, images: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> None:
    """Print the table of images with one mark each."""
    near = torch.nn.functional.max_pool2d(mask.float(), 5, stride=1, padding=2).bool()
    maps = dict(baseline_maps(model, images, labels))
    for method, layers in candidates(model, list(METHODS)):
        maps[method_name(method, layers)] = cam_maps(model, layers, method, images, labels)
    figures = {}
    for name, m in maps.items():
        hottest = mask.flatten(1).gather(1, m.flatten(1).argmax(dim=1, keepdim=True)).double().mean().item()
        figures[name] = share_on(m, mask), share_on(m, near), hottest
    chance = mask.double().mean().item(), near.double().mean().item(), mask.double().mean().item()
    print("| heatmap | on the mark | within 2 pixels | hottest pixel on the mark |\n|---|---:|---:|---:|")
    default = method_name(METHOD, default_layers(model))
    for name, values in [*sorted(figures.items(), key=lambda item: -item[1][0]), ("chance", chance)]:
        cells = [name, *(f"{value:.1%}" for value in values)]
        print("| " + " | ".join(f"**{cell}**" if name == default else cell for cell in cells) + " |")


def two_marks(
    model: HybridClassifier, images: torch.Tensor, masks: list[torch.Tensor], labels: list[torch.Tensor]
) -> None:
    """Print the table of images with two marks each, the maps being of the first mark's class against the second's."""
    print("\n| contrast | on the marks, right sign | wrong sign |\n|---|---:|---:|")
    rows = []
    for method, layers in candidates(model, ["gradcam", "hirescam"]):
        with GradCAM(model, layers, method) as cam:
            chunks = zip(images.split(BATCH_SIZE), *(y.split(BATCH_SIZE) for y in labels), strict=True)
            maps = torch.cat([cam(dataset.normalize(x), a, b, normalize=False) for x, a, b in chunks])
        up, down = maps.relu(), (-maps).relu()
        right, wrong = (
            ((x * masks[0] + y * masks[1]).sum(dim=(1, 2))).mean().item() for x, y in ((up, down), (down, up))
        )
        name = method_name(method, layers)
        rows.append((name, right, wrong))
        if method == "gradcam":
            name = f"Finer-CAM on Grad-CAM, {' + '.join(layers)}"
            rows.append((name, share_on(up, masks[0]), share_on(up, masks[1])))
    for name, right, wrong in sorted(rows, key=lambda row: row[2] - row[1]):
        print(f"| {name} | {right:.1%} | {wrong:.1%} |")
    chance = masks[0].double().mean().item()
    print(f"| chance | {chance:.1%} | {chance:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    processes.set_threads()
    generator = torch.Generator().manual_seed(args.seed)
    marks = make_marks(generator)
    changes = RECIPE | dict(flip=False, shift=0, erase=0.0)  # nothing that moves or hides marks
    config = step_time.settings_of("default", epochs=args.epochs, seed=args.seed, **changes)
    images = dataset.load(args.data_dir, train=True)[0]
    labels, places = draw(len(images), generator)
    torch.manual_seed(args.seed)
    model, _ = fit(step_time.build(config), plant(images, marks, labels, places)[0], labels, config, "marks")

    images = dataset.load(args.data_dir, train=False)[0]
    labels, places = draw(len(images), generator)
    planted, mask = plant(images, marks, labels, places)
    right = train.predict(model, planted).argmax(dim=1) == labels
    print(f"right on {right.double().mean().item():.2%} of the test images with one mark\n")
    index = right.nonzero().flatten()[: args.num_images]
    one_mark(model, planted[index], mask[index], labels[index])

    others, other_places = draw(len(images), generator)
    apart = ((places - other_places).abs().amax(dim=1) >= 2 * SIDE) & (labels != others)
    planted, other_mask = plant(planted, marks, others, other_places)
    index = apart.nonzero().flatten()[: args.num_images]
    two_marks(model, planted[index], [mask[index], other_mask[index]], [labels[index], others[index]])


if __name__ == "__main__":
    main()
