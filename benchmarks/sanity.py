"""Would another model, or another class, get the same heatmap? Adebayo et al. 2018, in figures.

    python benchmarks/sanity.py

Maps of the shipped model are compared with maps of the same images, for the same class, after its
weights are randomised part by part from the head down (arXiv 1810.03292, section 3), and for other
classes. The figure is Spearman's rank correlation over the pixels that are not black.
"""

import copy
from collections.abc import Iterator

import results
import torch
from faithfulness import LOG_ODDS, candidate_name, rank_correlation
from torch import Tensor

import dataset
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import all_layers, default_layers

PARTS = ("head", "stem.down1", "stem.first")  # the cascade is compared after these


def randomized_from_the_top(model: HybridClassifier) -> Iterator[tuple[str, HybridClassifier]]:
    """The model with more and more parts randomised, and the latest's name, from head to stem."""
    torch.manual_seed(0)
    fresh = HybridClassifier(model.config).state_dict()
    changed = copy.deepcopy(model)
    names = ["head", "pool", "norm", *reversed(all_layers(model))]
    names.insert(3 + len(model.blocks), "pos_embed")  # added to what leaves the stem
    for name in names:
        part = {key: value for key, value in fresh.items() if f"{key}.".startswith(f"{name}.")}
        changed.load_state_dict(part, strict=False)
        yield name, changed


def correlations(
    model: HybridClassifier, method: str, log_odds: bool, layers: tuple[str, ...], images: Tensor
) -> dict[str, float]:
    """The correlation of a candidate's maps with each of the others."""
    x = dataset.normalize(images)
    cam = GradCAM(model, layers, method, log_odds=log_odds)
    maps = cam(x)
    ranking = cam.logits.argsort(dim=1, descending=True)
    others = {
        "the map of the second likeliest class": cam(x, ranking[:, 1]),
        "the map of the least likely class": cam(x, ranking[:, -1]),
    }
    for name, changed in randomized_from_the_top(model):
        if name in PARTS:
            changed_cam = GradCAM(changed, layers, method, log_odds=log_odds)
            others[f"random from the top to {name}"] = changed_cam(x, ranking[:, 0])
    return {name: rank_correlation(maps, o, images).mean().item() for name, o in others.items()}


def main() -> None:
    args = results.make_parser(__file__, __doc__).parse_args()
    if not args.table:
        set_threads()
        model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
        images = dataset.load(args.data_dir, train=False)[0][:200]
        default = tuple(default_layers(model))
        variants = [(method, LOG_ODDS, default) for method in METHODS]
        variants += [("gradcam", False, tuple(model.stage_ends()[-1:]))]
        rows: dict[str, results.Row] = {}
        for variant in variants:
            for other, figure in correlations(model, *variant, images).items():
                row = rows.setdefault(other, dict(compared_with=other))
                row[candidate_name(*variant)] = figure
        for row in rows.values():
            results.add(args.output, row, "compared_with")
    rows = results.read(args.output)
    maps = [name for name in rows[0] if name not in ("compared_with", "commit", "machine")]
    columns = dict(compared_with=("correlation of the map with", ""))
    results.print_table(rows, columns | {name: (name, ".2f") for name in maps})


if __name__ == "__main__":
    main()
