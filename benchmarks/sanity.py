"""Would another model, or another class, get the same heatmap? Adebayo et al. 2018, in figures.

    python benchmarks/sanity.py

The shipped model's maps are compared with those for other classes, and with those of the same class
after its weights are randomised from the head down (arXiv 1810.03292, section 3). The figure is
Spearman's rank correlation over the pixels that are not black.
"""

import argparse
import copy
from collections.abc import Iterator

import results
import torch
from faithfulness import Candidate, candidate_maps, candidate_name, rank_correlation
from torch import Tensor

import dataset
from explaining.explanation import classify
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from Visulization import all_layers

PARTS = ("head", "stem.down1", "stem.first")  # the cascade is compared after these
CANDIDATES = [  # the default, the earlier default, and two classics
    ("hirescam", True, ("stem.stage0_0", "stem.down1"), False),
    ("layercam", False, ("stem.stage0_2", "stem.down1"), False),
    ("gradcam", False, ("stem.stage2_0",), False),
    ("gradcam++", False, ("stem.down1",), False),
]
COLUMNS = dict(compared_with=("correlation of the map with", ""))
COLUMNS |= {candidate_name(*each): (candidate_name(*each), ".2f") for each in CANDIDATES}


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
    model: HybridClassifier, chosen: list[Candidate], images: Tensor
) -> Iterator[tuple[str, results.Row]]:
    """What the candidates' maps are compared with, and the correlation of each."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    maps = candidate_maps(model, chosen, images, ranking[:, 0])
    others = {}
    for what, place in (("second likeliest", 1), ("least likely", -1)):
        found = candidate_maps(model, chosen, images, ranking[:, place])
        others[f"the map of the {what} class"] = found
    for part, changed in randomized_from_the_top(model):
        if part in PARTS:
            found = candidate_maps(changed, chosen, images, ranking[:, 0])
            others[f"random from the top to {part}"] = found
    for what, other in others.items():
        row = {}
        for name in maps:
            row[name] = rank_correlation(maps[name], other[name], images).mean().item()
        yield what, row


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each of the other maps."""
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    images = dataset.load(args.data_dir, train=False)[0][:200]
    for what, found in correlations(model, CANDIDATES, images):
        yield dict(compared_with=what) | found


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    results.run(parser, measure, ("compared_with",), COLUMNS)


if __name__ == "__main__":
    main()
