"""Would another model, or another class, get the same heatmap? Adebayo et al. 2018, in figures.

    python benchmarks/sanity.py

Maps of the shipped model are compared with maps of the same images, for the same class, after its
weights are randomised part by part from the head down (arXiv 1810.03292, section 3), and for other
classes. The figure is Spearman's rank correlation over the pixels that are not black.
"""

import copy
from collections.abc import Iterator

import numpy as np
import results
import torch
from faithfulness import method_name
from scipy.stats import spearmanr
from torch import Tensor

import dataset
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import METHOD, all_layers, default_layers


def rank_correlation(maps: Tensor, others: Tensor, images: Tensor) -> float:
    """The mean correlation of maps (N, 28, 28) over the bright pixels of images (N, 1, 28, 28).

    Where one of two maps is the same everywhere, they have nothing in common: 0.
    """
    total = 0.0
    garments = (images[:, 0] > 0).numpy()
    for a, b, garment in zip(maps.numpy(), others.numpy(), garments, strict=True):
        a, b = a[garment], b[garment]
        if np.ptp(a) and np.ptp(b):
            total += float(spearmanr(a, b).statistic)
    return total / len(maps)


def randomized_from_the_top(model: HybridClassifier) -> Iterator[tuple[str, HybridClassifier]]:
    """The model with more and more parts randomised, and the latest's name, from head to stem."""
    torch.manual_seed(0)
    fresh, changed = HybridClassifier(model.config).state_dict(), copy.deepcopy(model)
    names = ["head", "pool", "norm", *reversed(all_layers(model))]
    names.insert(3 + len(model.blocks), "pos_embed")  # added to what leaves the stem
    for name in names:
        part = {key: value for key, value in fresh.items() if f"{key}.".startswith(f"{name}.")}
        changed.load_state_dict(part, strict=False)
        yield name, changed


def correlations(
    model: HybridClassifier, layers: tuple[str, ...], method: str, images: Tensor
) -> dict[str, float]:
    """The correlation of a method's maps with each of the others."""
    x = dataset.normalize(images)
    cam = GradCAM(model, layers, method)
    maps = cam(x)
    ranking = cam.logits.argsort(dim=1, descending=True)
    others = {
        "the image's brightness": images[:, 0].float(),
        "the map of the second likeliest class": cam(x, ranking[:, 1]),
        "the map of the least likely class": cam(x, ranking[:, -1]),
    }
    for name, changed in randomized_from_the_top(model):
        changed_cam = GradCAM(changed, layers, method)
        others[f"random from the top to {name}"] = changed_cam(x, ranking[:, 0])
    return {name: rank_correlation(maps, other, images) for name, other in others.items()}


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--num-images", type=int, default=200)
    args = parser.parse_args()
    if not args.table:
        set_threads()
        model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
        images = dataset.load(args.data_dir, train=False)[0][: args.num_images]
        default = tuple(default_layers(model))
        variants = [(default, METHOD), (tuple(model.stage_ends()[-1:]), "gradcam")]
        variants += [(default, method) for method in METHODS if method != METHOD]
        variants += [(default[1:], "gradcam++")]
        rows: dict[str, results.Row] = {}
        for layers, method in variants:
            for other, figure in correlations(model, layers, method, images).items():
                row = rows.setdefault(other, dict(compared_with=other))
                row[method_name(method, layers)] = figure
        for row in rows.values():
            results.add(args.output, row, "compared_with")
    rows = results.read(args.output)
    maps = [name for name in rows[0] if name not in ("compared_with", "commit", "machine")]
    columns = dict(compared_with=("correlation of the map with", ""))
    results.print_table(rows, columns | {name: (name, ".2f") for name in maps})


if __name__ == "__main__":
    main()
