"""How often a map says something: its hottest tenth of the garment matters more than random tenths.

python benchmarks/masking.py    500 test images, the shipped model
"""

import argparse
from collections.abc import Iterator

import numpy as np
import results
import torch

import dataset
from explaining.explanation import explain, mask_evidence
from model import SHIPPED_CHECKPOINT, load_checkpoint
from Visulization import METHOD, default_layers, make_cam

MAPS = ("the default", "the default, --versus next", "brightness", "a random map")
COLUMNS = dict(
    map=("map", ""),
    whole=("whole image", ".3f"),
    hottest=("without the hottest tenth", ".3f"),
    random=("without a random tenth", ".3f"),
    below=("hottest below random", ".1%"),
    says_something=("says something", ".1%"),
)


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each kind of map."""
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    images, labels = (part[:500] for part in dataset.load(args.data_dir, train=False))
    cam = make_cam(model, default_layers(model), METHOD)
    noise = torch.rand(500, 28, 28, generator=torch.Generator().manual_seed(1)).numpy()
    for name in MAPS:
        explanations = explain(cam, images, labels, versus="next" if "next" in name else None)
        for e, random_map in zip(explanations, noise, strict=True):
            del e.evidence[1:]
            if name == "brightness":
                e.evidence[0].heatmap = e.image.astype(np.float32)
            elif name == "a random map":
                e.evidence[0].heatmap = random_map
        mask_evidence(model, explanations)
        figures = np.array([e.evidence[0].probabilities for e in explanations])
        whole, hottest, random, deviation = figures.T
        row = dict(map=name, whole=whole.mean(), hottest=hottest.mean(), random=random.mean())
        row["below"] = (hottest < random).mean()
        yield row | dict(says_something=(random - hottest > deviation).mean())


def main() -> None:
    results.run(results.make_parser(__file__, __doc__), measure, ("map",), COLUMNS)


if __name__ == "__main__":
    main()
