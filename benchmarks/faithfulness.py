"""Do the heatmaps show what the model's decision rests on? Layers and methods against baselines.

    python benchmarks/faithfulness.py    half an hour on two cores

A reader looks at a map's hottest places: these have to matter, and for this class. So the default
of Visulization.py is chosen by this rule, fixed on 2026-11-30 before its first run:

1. Candidates are all methods of gradcam.py, for the logit and for the log-odds, at all layers from
   the first convolution to the last block, and at all pairs of these.
2. A candidate depends on the class if its maps have a rank correlation of at most 0.6 with those of
   the least likely class: over the garment's pixels, the mean of all images.
3. On 150 training images, the ten that depend on the class and beat chance most often go on: the
   hottest tenth of the garment, black, lowers the probability more than 20 random tenths do.
4. On 500 other training images, the first is the one that beats chance most often. Of those within
   one standard error of it, the one with the highest insertion minus deletion wins.
5. The winner replaces an earlier default only if it beats chance more often by two standard errors.
   It is measured on 1,000 test images once; nothing is chosen there.

Each map is for the predicted class, whose probability is followed:

- beats chance, and says something: as Visulization.py prints it (explaining/explanation.py)
- deletion: the hottest pixels turn black first; the mean probability on the way (RISE, Petsiuk et
  al. 2018, arXiv 1806.07421)
- insertion: the hottest pixels return first, on a blurred image
- other class: the correlation of the second step
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import results
import torch
from captum.attr import Saliency
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.transforms import GaussianBlur

import dataset
from explaining.explanation import Evidence, Explanation, classify, mask_evidence
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import METHOD, all_layers, default_layers

SCREENED = slice(500, 650)  # of the training images
FINALISTS = 10
LOG_ODDS = False
MOST_ALIKE = 0.6
STEPS = 10  # of deletion and insertion
BATCH_SIZE = 50  # what fits into a CPU's caches
GAUSSIAN_SIGMA = 7  # pixels
COLUMNS = dict(
    map=("heatmap", ""),
    beats_chance=("beats chance ↑", ".1%"),
    says_something=("says something ↑", ".1%"),
    deletion=("deletion ↓", ".3f"),
    insertion=("insertion ↑", ".3f"),
    merit=("insertion minus deletion ↑", ".3f"),
    merit_error=("its standard error", ".3f"),
    other_class=("other class ↓", ".2f"),
)


# ---- The maps ----

Candidate = tuple[str, bool, tuple[str, ...]]  # method, log-odds or not, layers
Maps = dict[str, Tensor]  # by name: float32 (N, 28, 28), never negative


def candidates(model: HybridClassifier) -> dict[str, Candidate]:
    """All candidates by name."""
    layers = all_layers(model)
    chosen = [(layer,) for layer in layers] + list(itertools.combinations(layers, 2))
    every = itertools.product(METHODS, (False, True), chosen)
    return {candidate_name(*candidate): candidate for candidate in every}


def candidate_name(method: str, log_odds: bool, layers: tuple[str, ...]) -> str:
    """Its name in the tables."""
    score = " of log-odds" if log_odds else ""
    return f"{method}{score} {' + '.join(layers)}"


def cam_maps(cam: GradCAM, images: Tensor, classes: Tensor) -> Tensor:
    """Shares of evidence (N, 28, 28) in uint8 images (N, 1, 28, 28) for classes (N,)."""
    maps = []
    for some, target in zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True):
        maps.append(cam(dataset.normalize(some), target, normalize=False))
    return torch.cat(maps)


def candidate_maps(
    model: HybridClassifier, chosen: dict[str, Candidate], images: Tensor, classes: Tensor
) -> Maps:
    """The maps of some candidates."""
    single, maps = {}, {}
    for name, (method, log_odds, layers) in chosen.items():
        for layer in layers:
            key = method, log_odds, layer
            if key not in single:
                cam = GradCAM(model, layer, method, log_odds=log_odds)
                single[key] = cam_maps(cam, images, classes)
        # The order of the pixels is that of the mean.
        maps[name] = sum(single[method, log_odds, layer] for layer in layers)
    return maps


def baseline_maps(model: HybridClassifier, images: Tensor, classes: Tensor) -> Maps:
    """Maps that a good explanation must beat."""
    noise = torch.rand(len(images), 28, 28, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(28) - 13.5
    gaussian = (-(distance[:, None] ** 2 + distance**2) / (2 * GAUSSIAN_SIGMA**2)).exp()
    x = dataset.normalize(images).requires_grad_()
    torch.manual_seed(0)
    untrained = GradCAM(HybridClassifier(model.config), default_layers(model), METHOD)
    return {
        "a random map": noise,
        "a random map, blurred": GaussianBlur(11, sigma=3.0)(noise),
        "a centred Gaussian": gaussian.expand(len(images), -1, -1),
        "the image's brightness": images[:, 0].float(),
        "input gradients": Saliency(model).attribute(x, target=classes)[:, 0].detach(),
        "the default, untrained model": cam_maps(untrained, images, classes),
    }


# ---- The measures ----


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


def masking(
    model: HybridClassifier, images: Tensor, classes: Tensor, maps: Maps
) -> dict[str, results.Row]:
    """Of each map, the share of images where it beats chance, and where it says something."""
    explanations = []
    for i, found in enumerate(classify(model, images)):
        evidence = [Evidence(int(classes[i]), -1, some[i].numpy()) for some in maps.values()]
        explanations.append(Explanation(images[i, 0].numpy(), -1, found.numpy(), evidence))
    mask_evidence(model, explanations)
    rows = {}
    for i, name in enumerate(maps):
        evidence = [e.evidence[i] for e in explanations]
        beats = [e.heatmap.any() and e.probabilities[1] < e.probabilities[2] for e in evidence]
        says = [e.verdict() == "says something" for e in evidence]
        rows[name] = dict(beats_chance=np.mean(beats), says_something=np.mean(says))
    return rows


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


def measure(model: HybridClassifier, images: Tensor, classes: Tensor, maps: Tensor) -> results.Row:
    """Deletion and insertion of maps (N, 28, 28) of uint8 images (N, 1, 28, 28)."""
    deletion = curve(model, images, torch.zeros_like(images), classes, maps)
    insertion = curve(model, GaussianBlur(11, sigma=5.0)(images), images, classes, maps)
    merit = insertion - deletion
    return dict(
        deletion=deletion.mean().item(),
        insertion=insertion.mean().item(),
        merit=merit.mean().item(),
        merit_error=(merit.std() / len(images) ** 0.5).item(),
    )


# ---- The choice ----


def screen(model: HybridClassifier, images: Tensor) -> list[str]:
    """The names of the candidates that go on, best first."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    maps = candidate_maps(model, candidates(model), images, ranking[:, 0])
    others = candidate_maps(model, candidates(model), images, ranking[:, -1])
    rows = masking(model, images, ranking[:, 0], maps)
    chosen = []
    for name in sorted(rows, key=lambda name: -rows[name]["beats_chance"]):
        alike = rank_correlation(maps[name], others[name], images)
        print(f"{rows[name]['beats_chance']:.1%} {alike:.2f} {name}")
        if alike <= MOST_ALIKE:
            chosen.append(name)
    return chosen[:FINALISTS]


def measure_maps(
    model: HybridClassifier, images: Tensor, names: list[str]
) -> Iterator[results.Row]:
    """A row for each baseline, and for the candidates with some names."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    classes = ranking[:, 0]
    chosen = {name: candidates(model)[name] for name in names}
    others = candidate_maps(model, chosen, images, ranking[:, -1])
    maps = baseline_maps(model, images, classes)
    maps |= candidate_maps(model, chosen, images, classes)
    for name, row in masking(model, images, classes, maps).items():
        row = dict(images=len(images), map=name) | row
        row |= measure(model, images, classes, maps[name])
        if name in others:
            row["other_class"] = rank_correlation(maps[name], others[name], images)
        yield row


def winner(rows: list[dict[str, str]]) -> str:
    """The map that the rule chooses, of the rows of the 500 training images."""
    rows = [row for row in rows if row["other_class"] and float(row["other_class"]) <= MOST_ALIKE]
    best = max(float(row["beats_chance"]) for row in rows)
    error = (best * (1 - best) / int(rows[0]["images"])) ** 0.5
    near = [row for row in rows if float(row["beats_chance"]) >= best - error]
    return max(near, key=lambda row: float(row["merit"]))["map"]


def rows_of(path: Path, split: str) -> list[dict[str, str]]:
    """The saved rows of a split."""
    return [row for row in results.read(path) if row["split"] == split]


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    args = parser.parse_args()
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    model.requires_grad_(False)
    default = candidate_name(METHOD, LOG_ODDS, tuple(default_layers(model)))
    classic = candidate_name("gradcam", False, tuple(model.stage_ends()[-1:]))
    if not args.table:
        set_threads()
        images = dataset.load(args.data_dir, train=True)[0]
        names = screen(model, images[SCREENED])
        for row in measure_maps(model, images[:500], [*names, default, classic]):
            results.add(args.output, dict(split="training") | row, "split", "map")
        chosen = winner(rows_of(args.output, "training"))
        images = dataset.load(args.data_dir, train=False)[0][:1000]
        for row in measure_maps(model, images, [chosen, default, classic]):
            results.add(args.output, dict(split="test") | row, "split", "map")
    for split in ("training", "test"):
        print(f"\n{split} images\n")
        results.print_table(rows_of(args.output, split), COLUMNS, bold=("map", default))


if __name__ == "__main__":
    main()
