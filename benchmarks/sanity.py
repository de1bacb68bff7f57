"""Would another model, or another class, get the same heatmap? A sanity check of Adebayo et al. 2018 in figures.

    python benchmarks/sanity.py

Maps of test images by the shipped model are compared with maps of the same images, for the same class,

- after its weights are randomised, part by part from the head down, everything above staying random (Adebayo et al.,
  "Sanity Checks for Saliency Maps", NeurIPS 2018, arXiv 1810.03292, the cascading randomisation of section 3), and
- by the model as it is, for the second likeliest and for the least likely class.

The figure is Spearman's rank correlation of two maps over the pixels that are not black: 1 means the same order, 0
nothing in common. All pixels together would give a high figure to any two maps that leave the background out.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
from gradcam import METHODS, GradCAM
from model import HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import METHOD, SHIPPED_CHECKPOINT, all_layers, default_layers


def rank_correlation(maps: torch.Tensor, others: torch.Tensor, images: torch.Tensor) -> float:
    """The mean correlation of two sets of maps (N, 28, 28) over the bright pixels of uint8 images (N, 1, 28, 28).

    Where one of two maps is the same everywhere, they have nothing in common: 0.
    """
    total = 0.0
    for a, b, garment in zip(maps.numpy(), others.numpy(), (images[:, 0] > 0).numpy(), strict=True):
        a, b = a[garment], b[garment]
        total += float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0
    return total / len(maps)


def randomized_from_the_top(model: HybridClassifier, seed: int = 0) -> Iterator[tuple[str, HybridClassifier]]:
    """The model with more and more parts randomised, and the name of the latest: the head first, "stem.first" last."""
    torch.manual_seed(seed)
    fresh, changed = HybridClassifier(model.config).state_dict(), copy.deepcopy(model)
    names = ["head", "pool", "norm", *reversed(all_layers(model))]
    names.insert(3 + len(model.blocks), "pos_embed")  # added to what leaves the stem, before the blocks
    for name in names:
        part = {key: value for key, value in fresh.items() if f"{key}.".startswith(f"{name}.")}
        changed.load_state_dict(part, strict=False)
        yield name, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--num-images", type=int, default=200)
    args = parser.parse_args()
    set_threads()
    model, _ = load_checkpoint(args.checkpoint)
    images = dataset.load(args.data_dir, train=False)[0][: args.num_images]
    x = dataset.normalize(images)
    variants = {
        f"{method} {' + '.join(layers)}": (layers, method)
        for layers, method in [(default_layers(model), METHOD), (model.stage_ends()[-1:], "gradcam")]
        + [(default_layers(model), method) for method in METHODS if method != METHOD]
        + [(default_layers(model)[1:], "gradcam++")]
    }
    columns: dict[str, dict[str, float]] = {}
    for variant, (layers, method) in variants.items():
        cam = GradCAM(model, layers, method)
        maps = cam(x)
        ranking = cam.logits.argsort(dim=1, descending=True)
        column = columns[variant] = {}
        for name, others in (
            ("the image's brightness", images[:, 0].float()),
            ("the map of the second likeliest class", cam(x, ranking[:, 1])),
            ("the map of the least likely class", cam(x, ranking[:, -1])),
            *(
                (f"random from the top to {name}", GradCAM(changed, layers, method)(x, ranking[:, 0]))
                for name, changed in randomized_from_the_top(model)
            ),
        ):
            column[name] = rank_correlation(maps, others, images)
    print(f"{len(images)} test images, {args.checkpoint.name}\n")
    print("| correlation of the map with | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
