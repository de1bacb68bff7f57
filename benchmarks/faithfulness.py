"""Do the heatmaps show what the model's decision rests on? Layers and methods against baselines.

    python benchmarks/faithfulness.py                              half an hour on two cores
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

- beats chance, and says something: as Visulization.py prints it (explaining/explanation.py)
- deletion: the hottest pixels turn black first; the mean probability on the way (RISE, Petsiuk et
  al. 2018, arXiv 1806.07421)
- insertion: the hottest pixels return first, on a blurred image
- other class: the correlation of the first step
"""

import itertools
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
from gradcam import METHODS, GradCAM, shares_of_evidence
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import LOG_ODDS, METHOD, all_layers, default_layers

FINALISTS = 6
MOST_ALIKE = 0.6
STEPS = 10  # of deletion and insertion
BATCH_SIZE = 50  # what fits into a CPU's caches
COLUMNS = dict(
    map=("heatmap", ""),
    beats_chance=("beats chance ↑", ".1%"),
    beats_chance_error=("± standard error", ".1%"),
    says_something=("says something ↑", ".1%"),
    deletion=("deletion ↓", ".3f"),
    insertion=("insertion ↑", ".3f"),
    merit=("insertion minus deletion ↑", ".3f"),
    merit_error=("± standard error", ".3f"),
    other_class=("other class ↓", ".2f"),
)


# ---- The maps ----

# Method, log-odds or not, layers, averaged with the mirror image or not.
Candidate = tuple[str, bool, tuple[str, ...], bool]
Maps = dict[str, Tensor]  # by name: float32 (N, 28, 28), never negative
Figures = dict[str, Tensor]  # by column: one for each image, (N,)


def candidate_name(
    method: str, log_odds: bool, layers: tuple[str, ...], mirror: bool = False
) -> str:
    """Its name in the tables."""
    score = " of log-odds" if log_odds else ""
    end = ", and mirrored" if mirror else ""
    return f"{method}{score} {' + '.join(layers)}{end}"


def layer_maps(
    model: HybridClassifier, log_odds: bool, images: Tensor, classes: Tensor
) -> dict[Candidate, Tensor]:
    """Maps of uint8 images (N, 1, 28, 28) for classes (N,): of all layers, by all methods."""
    layers = all_layers(model)
    chunks = []
    for some, target in zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True):
        cam, seen = GradCAM(model, layers, log_odds=log_odds), []
        cam.method = lambda *outputs, seen=seen: seen.append(outputs) or outputs[1]
        cam(dataset.normalize(some), target)
        maps = {}
        for layer, (activation, gradient) in zip(layers, seen, strict=True):
            for name, method in METHODS.items():
                products = method(activation, gradient) * activation
                key = name, log_odds, (layer,), False
                maps[key] = shares_of_evidence(products, (28, 28), False)
        chunks.append(maps)
    return {key: torch.cat([maps[key] for maps in chunks]) for key in chunks[0]}


def candidate_maps(
    model: HybridClassifier, chosen: list[Candidate], images: Tensor, classes: Tensor
) -> Maps:
    """The maps of some candidates; if none is chosen, of all at single layers."""
    single = layer_maps(model, False, images, classes) | layer_maps(model, True, images, classes)
    mirrored = {}
    if any(mirror for *_, mirror in chosen):
        mirrored = layer_maps(model, True, images.flip(3), classes)
    maps = {}
    for candidate in chosen or single:
        method, log_odds, layers, mirror = candidate
        keys = [(method, log_odds, (layer,), False) for layer in layers]
        parts = [single[key] for key in keys]
        if mirror:
            parts += [mirrored[key].flip(2) for key in keys]
        maps[candidate_name(*candidate)] = sum(parts)  # its order of the pixels is the mean's
    return maps


def baseline_maps(model: HybridClassifier, images: Tensor, classes: Tensor) -> Maps:
    """Maps that a good explanation must beat."""
    noise = torch.rand(len(images), 28, 28, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(28) - 13.5
    centre = 1000 - (distance[:, None] ** 2 + distance**2)
    x = dataset.normalize(images).requires_grad_()
    torch.manual_seed(0)
    blank = HybridClassifier(model.config)
    untrained = GradCAM(blank, default_layers(model), METHOD, log_odds=LOG_ODDS)
    return {
        "a random map": noise,
        "a centred Gaussian": centre.expand(len(images), -1, -1),
        "the image's brightness": images[:, 0].float(),
        "input gradients": Saliency(model).attribute(x, target=classes)[:, 0].detach(),
        "the default, untrained model": untrained(dataset.normalize(images), classes),
    }


# ---- The measures ----


def rank_correlation(maps: Tensor, others: Tensor, images: Tensor) -> Tensor:
    """Spearman's (N,) of maps (N, 28, 28) over the bright pixels of images (N, 1, 28, 28).

    Where one of two maps is the same everywhere, they have nothing in common: 0.
    """
    found = torch.zeros(len(maps))
    garments = images[:, 0] > 0
    for i, (a, b, garment) in enumerate(zip(maps, others, garments, strict=True)):
        a, b = a[garment].numpy(), b[garment].numpy()
        if np.ptp(a) and np.ptp(b):
            found[i] = spearmanr(a, b).statistic
    return found


def masking(
    model: HybridClassifier, images: Tensor, classes: Tensor, maps: Maps
) -> dict[str, Figures]:
    """Whether each map beats chance, and whether it says something."""
    explanations = []
    for i, found in enumerate(classify(model, images)):
        evidence = [Evidence(int(classes[i]), -1, some[i].numpy()) for some in maps.values()]
        explanations.append(Explanation(images[i, 0].numpy(), -1, found.numpy(), evidence))
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
    model: HybridClassifier, images: Tensor, chosen: list[Candidate], with_baselines: bool = False
) -> dict[str, Figures]:
    """Figures of some candidates, or of all at single layers: without curves, which take long."""
    ranking = classify(model, images).argsort(dim=1, descending=True)
    classes = ranking[:, 0]
    others = candidate_maps(model, chosen, images, ranking[:, -1])
    maps = candidate_maps(model, chosen, images, classes)
    if with_baselines:
        maps |= baseline_maps(model, images, classes)
    figures = masking(model, images, classes, maps)
    blurred = GaussianBlur(11, sigma=5.0)(images)
    for name, some in figures.items():
        if name in others:
            some["other_class"] = rank_correlation(maps[name], others[name], images)
        if chosen:
            some["deletion"] = curve(model, images, torch.zeros_like(images), classes, maps[name])
            some["insertion"] = curve(model, blurred, images, classes, maps[name])
            some["merit"] = some["insertion"] - some["deletion"]
    return figures


# ---- The choice ----


def finalists(model: HybridClassifier, rows: list[dict[str, str]]) -> list[Candidate]:
    """The candidates that the second step chooses, of the screened ones' rows."""
    rows = [row for row in rows if float(row["other_class"]) <= MOST_ALIKE]
    rows.sort(key=lambda row: -float(row["beats_chance"]))
    best = {row["map"] for row in rows[:FINALISTS]}
    layers = [(layer,) for layer in all_layers(model)]
    every = itertools.product(METHODS, (False, True), layers, [False])
    chosen = [candidate for candidate in every if candidate_name(*candidate) in best]
    for one, other in itertools.combinations(chosen, 2):
        if one[:2] == other[:2]:
            chosen.append((*one[:2], one[2] + other[2], False))
    return chosen


def second_look(model: HybridClassifier) -> list[Candidate]:
    """The candidates of the fifth step."""
    blocks = [f"stem.stage0_{i}" for i in range(model.config.stem_blocks[0])]
    pairs = [(block, "stem.down1") for block in blocks]
    return list(itertools.product(("hirescam", "layercam"), [True], pairs, (False, True)))


def winner(rows: list[dict[str, str]]) -> str:
    """The map that the rule chooses, of the rows of the 500 training images."""
    rows = [row for row in rows if row["other_class"] and float(row["other_class"]) <= MOST_ALIKE]
    first = max(rows, key=lambda row: float(row["beats_chance"]))
    least = float(first["beats_chance"]) - float(first["beats_chance_error"])
    near = [row for row in rows if float(row["beats_chance"]) >= least]
    return max(near, key=lambda row: float(row["merit"]))["map"]


def save(path: Path, split: str, figures: dict[str, Figures]) -> list[dict[str, str]]:
    """Save means and standard errors, and return all rows of the split."""
    for name, some in figures.items():
        row = dict(split=split, images=len(some["beats_chance"]), map=name)
        for column, values in some.items():
            row[column] = values.double().mean().item()
            row[f"{column}_error"] = (values.double().std() / len(values) ** 0.5).item()
        results.add(path, row, "split", "map")
    return [row for row in results.read(path) if row["split"] == split]


def measure_own(path: Path, images: Tensor) -> tuple[str, dict[str, Figures]]:
    """A checkpoint's recipe, and whether its default map and a random one beat chance."""
    model, checkpoint = load_checkpoint(path)
    model.requires_grad_(False)
    classes = classify(model, images).argmax(dim=1)
    default = METHOD, LOG_ODDS, tuple(default_layers(model)), False
    maps = candidate_maps(model, [default], images, classes)
    maps["a random map"] = baseline_maps(model, images, classes)["a random map"]
    return checkpoint["train_config"]["recipe"], masking(model, images, classes, maps)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--own", type=Path, metavar="CHECKPOINT", help="only measure this one")
    args = parser.parse_args()
    if args.own:
        images = dataset.load(args.data_dir, train=False)[0][:1000]
        recipe, figures = measure_own(args.own, images)
        rows = save(args.output, f"test, {recipe}", figures)
        return results.print_table(rows, COLUMNS)
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    model.requires_grad_(False)
    default = METHOD, LOG_ODDS, tuple(default_layers(model)), False
    earlier = "layercam", False, ("stem.stage0_2", "stem.down1"), False
    classic = "gradcam", False, tuple(model.stage_ends()[-1:]), False
    if not args.table:
        set_threads()
        images = dataset.load(args.data_dir, train=True)[0]
        rows = save(args.output, "screening", measure(model, images[500:650], []))
        chosen = finalists(model, rows)
        save(args.output, "training", measure(model, images[:500], [*chosen, earlier, classic]))
        chosen = second_look(model)
        rows = save(args.output, "second look", measure(model, images[1000:1500], chosen))
        best = winner(rows)
        chosen = [c for c in chosen if candidate_name(*c) == best or c == default]
        images = dataset.load(args.data_dir, train=False)[0][:1000]
        save(args.output, "test", measure(model, images, [*chosen, earlier, classic], True))
    for split in ("screening", "training", "second look", "test"):
        rows = [row for row in results.read(args.output) if row["split"] == split]
        print(f"\n{split} images\n")
        results.print_table(rows, COLUMNS, bold=("map", candidate_name(*default)))


if __name__ == "__main__":
    main()
