"""Do the heatmaps show what the model's decision rests on? Layers and methods against baselines.

    python benchmarks/faithfulness.py                           twenty minutes on one core
    python benchmarks/faithfulness.py --own checkpoints/best.pt  whether your own map beats chance

A reader looks at a map's hottest places: these have to matter, and for this class. So the default
of Visulization.py is chosen by this rule of 2026-11-30, written before the measurement:

1. A map is made by a method of gradcam.py, for the logit or the log-odds, at a layer from the first
   convolution to the last block. It depends on the class if its rank correlation with the map of
   the least likely class is at most 0.6: over the garment's pixels, the mean of all images.
2. On 150 training images, the six that depend on the class and beat chance most often go on: the
   hottest tenth of the garment, black, lowers the probability more than 20 random tenths do. Pairs
   of two of their layers go on, too, if the two have method and score in common.
3. On 500 other training images, the first is the one that depends on the class and beats chance
   most often. Of those within one standard error of it, the one with the highest insertion minus
   deletion wins.
4. The winner replaces an earlier default only if it beats chance more often by two standard errors.
5. A second look, written after the first and before its own measurement: step 2 left LayerCAM out,
   and a map can be averaged with the mirror image's. HiResCAM and LayerCAM of log-odds, at
   stem.down1 and each block at 28x28, averaged so or not: on 500 further training images, step 3
   chooses the default among these.
6. The default is measured on 1,000 test images, where nothing is chosen: before the second look.

Each map is for the predicted class, whose probability is followed:

- beats chance, says something ↑: as Visulization.py prints it (explaining/explanation.py)
- deletion ↓: the hottest pixels turn black first; the mean probability on the way (RISE, Petsiuk et
  al. 2018, arXiv 1806.07421)
- insertion ↑: the hottest pixels return first, on a blurred image
- other class ↓: the correlation of the first step
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import results
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.transforms import GaussianBlur

import dataset
from explaining.explanation import Evidence, Explanation, classify, mask_evidence
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from Visulization import LOG_ODDS, METHOD, all_layers, default_layers

FINALISTS = 6
MOST_ALIKE = 0.6
STEPS = 10  # of deletion and insertion
BATCH_SIZE = 50  # what fits into a CPU's caches


# ---- The maps ----

# Of normalised images (N, 1, 28, 28) and classes (N,): maps, float32 (N, 28, 28), never negative.
Explainer = Callable[[Tensor, Tensor], Tensor]
Figures = dict[str, Tensor]  # by column: one for each image, (N,)


class Candidate(NamedTuple):
    """A kind of map that gradcam.py makes."""

    method: str
    log_odds: bool
    layers: tuple[str, ...]
    mirror: bool = False  # averaged with the mirror image's

    def __str__(self) -> str:
        score = " of log-odds" if self.log_odds else ""
        end = ", and mirrored" if self.mirror else ""
        return f"{self.method}{score} {' + '.join(self.layers)}{end}"


EARLIER = Candidate("layercam", False, ("stem.stage0_2", "stem.down1"))  # the earlier default
CLASSIC = Candidate("gradcam", False, ("stem.stage2_0",))


def default_of(model: HybridClassifier) -> Candidate:
    """What Visulization.py draws."""
    return Candidate(METHOD, LOG_ODDS, tuple(default_layers(model)))


def cam_of(model: HybridClassifier, candidate: Candidate) -> GradCAM:
    method, log_odds, layers, _ = candidate
    return GradCAM(model, layers, method, log_odds=log_odds)


def in_parts(explain: Explainer, x: Tensor, classes: Tensor) -> Tensor:
    """The maps, made for a few images at a time."""
    parts = zip(x.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True)
    return torch.cat([explain(*part) for part in parts])


def maps_of(
    model: HybridClassifier, candidate: Candidate, images: Tensor, classes: Tensor
) -> Tensor:
    """A candidate's maps (N, 28, 28) of uint8 images (N, 1, 28, 28) for classes (N,)."""
    explain = partial(cam_of(model, candidate), normalize=False)
    maps = in_parts(explain, dataset.normalize(images, model.data), classes)
    if candidate.mirror:
        x = dataset.normalize(images.flip(3), model.data)
        maps += in_parts(explain, x, classes).flip(2)
    return maps


def baseline_maps(model: HybridClassifier, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Maps that a good explanation must beat."""
    torch.manual_seed(0)
    untrained = HybridClassifier(model.config, model.data)
    return {
        "a random map": torch.rand(len(images), 28, 28, generator=torch.Generator().manual_seed(0)),
        "the image's brightness": images[:, 0].float(),
        "the default, untrained model": maps_of(untrained, default_of(model), images, classes),
    }


# ---- The measures ----


def rank_correlation(maps: Tensor, others: Tensor, images: Tensor) -> Tensor:
    """Spearman's (N,) of maps (N, 28, 28) over the bright pixels of images (N, 1, 28, 28).

    Where one of two maps is the same everywhere, they have nothing in common: 0.
    """
    found = []
    for a, b, garment in zip(maps, others, images[:, 0] > 0, strict=True):
        found.append(spearmanr(a[garment], b[garment]).statistic)
    return torch.tensor(found).nan_to_num()


def masking(
    model: HybridClassifier, images: Tensor, classes: Tensor, maps: dict[str, Tensor]
) -> dict[str, Figures]:
    """Whether maps beat chance and say something."""
    explanations = []
    for i, found in enumerate(classify(model, images).numpy()):
        evidence = [Evidence(int(classes[i]), -1, some[i].numpy()) for some in maps.values()]
        explanations.append(Explanation(images[i, 0].numpy(), -1, found, evidence))
    mask_evidence(model, explanations)
    figures = {}
    for i, name in enumerate(maps):
        evidence = [e.evidence[i] for e in explanations]
        beats = [e.heatmap.any() and e.probabilities[1] < e.probabilities[2] for e in evidence]
        says = [e.verdict() == "says something" for e in evidence]
        figures[name] = dict(beats_chance=torch.tensor(beats), says_something=torch.tensor(says))
    return figures


@torch.autocast("cpu", torch.bfloat16)  # moves the third decimal, and is four times as fast
def curve(
    model: HybridClassifier, before: Tensor, after: Tensor, classes: Tensor, maps: Tensor
) -> Tensor:
    """The mean probability (N,) of classes while images `before` become `after`, hottest first."""
    ranks = maps.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view_as(before)
    found = []
    for count in torch.linspace(0, ranks[0].numel(), STEPS + 1):
        some = torch.where(ranks < count, after, before)
        found.append(classify(model, some).gather(1, classes[:, None])[:, 0])
    return torch.trapezoid(torch.stack(found).float(), dim=0) / STEPS


def measure(
    split: str,
    model: HybridClassifier,
    images: Tensor,
    chosen: list[Candidate],
    baselines: bool = False,
    curves: bool = True,
) -> Iterator[results.Row]:
    """A row for each map: means and standard errors. Curves take long."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    classes, least_likely = ranking[:, 0], ranking[:, -1]
    maps = {str(each): maps_of(model, each, images, classes) for each in chosen}
    others = {str(each): maps_of(model, each, images, least_likely) for each in chosen}
    if baselines:
        maps |= baseline_maps(model, images, classes)
    black = torch.zeros_like(images)
    blurred = GaussianBlur(11, sigma=5.0)(images)
    for name, figures in masking(model, images, classes, maps).items():
        if name in others:
            figures["other_class"] = rank_correlation(maps[name], others[name], images)
        if curves:
            figures["deletion"] = curve(model, images, black, classes, maps[name])
            figures["insertion"] = curve(model, blurred, images, classes, maps[name])
            figures["merit"] = figures["insertion"] - figures["deletion"]
        row = dict(split=split, images=len(images), map=name)
        for column, values in figures.items():
            row[column] = values.double().mean()
            row[f"{column}_error"] = values.double().std() / len(values) ** 0.5
        yield row


# ---- The choice ----


def candidates(*options: Iterable) -> list[Candidate]:
    """All combinations of methods, scores, layers and, if given, mirrored or not."""
    return list(itertools.starmap(Candidate, itertools.product(*options)))


def changing_with_class(rows: results.Rows) -> results.Rows:
    """Those of maps that depend on the class; baselines were not asked."""
    return [row for row in rows if float(row["other_class"] or 1) <= MOST_ALIKE]


def finalists(screened: list[Candidate], rows: results.Rows) -> list[Candidate]:
    """Those that the second step chooses by their rows."""
    rows = changing_with_class(rows)
    rows.sort(key=lambda row: -float(row["beats_chance"]))
    best = {row["map"] for row in rows[:FINALISTS]}
    chosen = [each for each in screened if str(each) in best]
    for one, other in itertools.combinations(chosen, 2):
        if one[:2] == other[:2]:
            chosen.append(one._replace(layers=one.layers + other.layers))
    return chosen


def winner(rows: results.Rows) -> str:
    """The map that the third step chooses, of the rows of 500 training images."""
    rows = changing_with_class(rows)
    first = max(rows, key=lambda row: float(row["beats_chance"]))
    least = float(first["beats_chance"]) - float(first["beats_chance_error"])
    near = [row for row in rows if float(row["beats_chance"]) >= least]
    return max(near, key=lambda row: float(row["merit"]))["map"]


def follow_the_rule(path: Path, data_dir: str) -> Iterator[results.Row]:
    """The rows that its steps ask for; `path` is where they are saved."""

    def saved(split: str) -> results.Rows:
        return [row for row in results.read(path) if row["split"] == split]

    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    images, _ = dataset.load(data_dir, train=True)
    layers = [(layer,) for layer in all_layers(model)]
    screened = candidates(METHODS, (False, True), layers)
    yield from measure("screening", model, images[500:650], screened, curves=False)
    chosen = [*finalists(screened, saved("screening")), EARLIER, CLASSIC]
    yield from measure("training", model, images[:500], chosen)
    pairs = [(f"stem.stage0_{i}", "stem.down1") for i in range(3)]
    chosen = candidates(("hirescam", "layercam"), (True,), pairs, (False, True))
    yield from measure("second look", model, images[1000:1500], chosen)
    print(f"the rule chooses {winner(saved('second look'))}")
    chosen = [default_of(model), EARLIER, CLASSIC]
    images = dataset.load(data_dir, train=False)[0][:1000]
    yield from measure("test", model, images, chosen, baselines=True)


def measure_all(args: argparse.Namespace) -> Iterator[results.Row]:
    if not args.own:
        return follow_the_rule(args.output, args.data_dir)
    model, checkpoint = load_checkpoint(args.own)
    split = f"test, {checkpoint['train_config']['recipe']}"
    images = dataset.load(args.data_dir, train=False)[0][:1000]
    return measure(split, model, images, [default_of(model)], baselines=True, curves=False)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--own", type=Path, metavar="CHECKPOINT", help="only measure this one")
    results.run(parser, measure_all, ("split", "map"))


if __name__ == "__main__":
    main()
