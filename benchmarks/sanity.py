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
from faithfulness import CLASSIC, EARLIER, Candidate, default_of, maps_of, rank_correlation
from torch import Tensor

import dataset
from explaining.explanation import classify
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from Visulization import all_layers

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
    model: HybridClassifier, images: Tensor, chosen: list[Candidate]
) -> Iterator[results.Row]:
    """A row for each of the other maps: the correlation of each candidate's with it."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    classes = ranking[:, 0]
    maps = {each: maps_of(model, each, images, classes) for each in chosen}

    def row_of(what: str, other_model: HybridClassifier, other_classes: Tensor) -> results.Row:
        row = dict(compared_with=what)
        for each in chosen:
            others = maps_of(other_model, each, images, other_classes)
            row[str(each)] = rank_correlation(maps[each], others, images).mean()
        return row

    yield row_of("the map of the second likeliest class", model, ranking[:, 1])
    yield row_of("the map of the least likely class", model, ranking[:, -1])
    for part, changed in randomized_from_the_top(model):
        if part in PARTS:
            yield row_of(f"random from the top to {part}", changed, classes)


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    chosen = [default_of(model), EARLIER, CLASSIC, Candidate("gradcam++", False, ("stem.down1",))]
    return correlations(model, dataset.load(args.data_dir, train=False)[0][:200], chosen)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    results.run(parser, measure, ("compared_with",))


if __name__ == "__main__":
    main()
