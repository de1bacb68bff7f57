"""Do the heatmaps show what the model's decision rests on? Layers and methods against baselines.

    python benchmarks/faithfulness.py    500 training and 1,000 test images: hours

The default of Visulization.py is chosen on training images, and reported on test images. Each map
is for the predicted class, whose probability is followed:

- deletion: the hottest pixels turn black first; the mean probability on the way (RISE, Petsiuk et
  al. 2018, arXiv 1806.07421)
- insertion: the hottest pixels return first, on a blurred image; both also on the other canvas
- average drop and increase: when the image is multiplied by the map (arXiv 1710.11063)
- ROAD: the share of predictions kept when the hottest pixels are replaced by what their neighbours
  suggest (Rong et al. 2022, arXiv 2202.00449); the mean of 20, 40, 60 and 80 %

The measures are torchcam's and quantus's. Rows of commit 4ad6c9a were computed in bfloat16, which
moves the third decimal; that commit also has the controls, blurred maps, and attention rollout.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import results
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
from torchvision.transforms import GaussianBlur, Normalize
from tqdm import tqdm

import dataset
import train
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from Visulization import METHOD, default_layers

from quantus import ROAD  # isort: skip - after Visulization, which says what OpenCV lacks

Maps = Iterator[tuple[str, Tensor]]  # name, and float32 (N, 28, 28), never negative
SPLITS = dict(training=500, test=1000)  # images of each
STEPS = 14  # of deletion and insertion: two rows' worth of pixels each
BATCH_SIZE = 50  # what fits into a CPU's caches
GAUSSIAN_SIGMA = 7  # pixels
ROAD_PERCENTAGES = [20, 40, 60, 80]
COLUMNS = dict(
    map=("heatmap", ""),
    deletion=("deletion ↓", ".3f"),
    insertion=("insertion ↑", ".3f"),
    road=("ROAD ↓", ".1%"),
    average_drop=("average drop ↓", ".1%"),
    increase=("increase ↑", ".1%"),
    deletion_blurred=("deletion, blurred ↓", ".3f"),
    insertion_black=("insertion, black ↑", ".3f"),
)


# ---- The maps ----


def cam_maps(
    model: HybridClassifier,
    layers: tuple[str, ...],
    method: str,
    images: Tensor,
    classes: Tensor | None,
) -> Tensor:
    """Heatmaps of uint8 images (N, 1, 28, 28) for one class each; None takes the predicted ones."""
    maps = []
    with GradCAM(model, layers, method) as cam:
        for i in range(0, len(images), BATCH_SIZE):
            target = None if classes is None else classes[i : i + BATCH_SIZE]
            maps.append(cam(dataset.normalize(images[i : i + BATCH_SIZE]), target))
    return torch.cat(maps)


def method_name(method: str, layers: tuple[str, ...]) -> str:
    """A candidate's name in the tables."""
    return f"{method} {' + '.join(layers)}"


def random_map(images: Tensor) -> Tensor:
    """The same for any model and class."""
    return torch.rand(len(images), *images.shape[2:], generator=torch.Generator().manual_seed(0))


def baseline_maps(model: HybridClassifier, images: Tensor, classes: Tensor) -> Maps:
    """Maps that a good explanation must beat."""
    yield "a random map", random_map(images)
    size = images.shape[-1]
    distance = torch.arange(size) - (size - 1) / 2
    gaussian = (-(distance[:, None] ** 2 + distance**2) / (2 * GAUSSIAN_SIGMA**2)).exp()
    yield "a centred Gaussian", gaussian.expand(len(images), -1, -1)
    yield "the image's brightness", images[:, 0].float() / 255
    gradients = []
    for x, target in zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True):
        x = dataset.normalize(x).requires_grad_()
        gradients.append(Saliency(model).attribute(x, target=target)[:, 0].detach())
    yield "input gradients", torch.cat(gradients)
    torch.manual_seed(0)
    untrained = HybridClassifier(model.config).eval()
    last, default = (model.stage_ends()[-1],), tuple(default_layers(model))
    yield "Grad-CAM, untrained model", cam_maps(untrained, last, "gradcam", images, None)
    name = f"{method_name(METHOD, default)}, untrained model"
    yield name, cam_maps(untrained, default, METHOD, images, None)


def candidate_maps(
    model: HybridClassifier, images: Tensor, classes: Tensor, with_pairs: bool
) -> Maps:
    """Every method at the ends of the stem's stages and at the blocks; and pairs of layers."""
    default = default_layers(model)
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    layers = list(dict.fromkeys([*default, *model.stage_ends(), *blocks]))
    chosen = [(method, (layer,)) for method in METHODS for layer in layers]
    pairs = itertools.combinations(layers, 2) if with_pairs else [tuple(default)]
    chosen += [(METHOD, pair) for pair in pairs]
    chosen += [(method, tuple(default)) for method in METHODS if method != METHOD]
    for method, names in chosen:
        maps = cam_maps(model, names, method, images, classes)
        if maps.any():  # HiResCAM finds no evidence before a layer norm; ROAD takes no empty maps
            yield method_name(method, names), maps


# ---- The measures ----


class FixedMaps:
    """Ready-made maps, in the form of the extractor that torchcam's metrics ask for."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.maps = model, torch.empty(0)

    def __call__(self, class_idx: object = None, scores: object = None) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


def measure(model: HybridClassifier, images: Tensor, classes: Tensor, maps: Tensor) -> results.Row:
    """All measures of maps (N, 28, 28) of uint8 images (N, 1, 28, 28) for `classes` (N,)."""
    # The packages are given pixels from 0 to 1: what they leave out becomes black, not mean grey.
    from_pixels = nn.Sequential(Normalize([dataset.MEAN], [dataset.STD]), model).eval()
    pixels = images.float() / 255
    maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    extractor = FixedMaps(from_pixels)
    softmax = partial(torch.softmax, dim=1)
    curves = partial(
        DeletionInsertionMetric, extractor, softmax, steps=STEPS, batch_size=BATCH_SIZE
    )
    black, blurred = curves(), curves(baseline=GaussianBlur(11, sigma=5.0))
    masked = ClassificationMetric(extractor, softmax)
    for i in range(0, len(images), BATCH_SIZE):
        extractor.maps = maps[i : i + BATCH_SIZE]
        for metric in (black, blurred, masked):
            metric.update(pixels[i : i + BATCH_SIZE], classes[i : i + BATCH_SIZE].tolist())
    np.random.seed(0)  # quantus draws from NumPy's own generator
    options = dict(noise=0.01, disable_warnings=True, display_progressbar=False)
    kept = ROAD(percentages=ROAD_PERCENTAGES, **options)(
        model=from_pixels,
        x_batch=pixels.numpy(),
        y_batch=classes.numpy(),
        a_batch=maps[:, None].numpy(),
        device="cpu",
        batch_size=len(images),  # it reports its first batch alone
    )
    return dict(
        deletion=black.summary()["deletion_auc"],
        insertion=blurred.summary()["insertion_auc"],
        road=sum(kept.values()) / len(kept),
        average_drop=masked.summary()["avg_drop"],
        increase=masked.summary()["conf_increase"],
        deletion_blurred=blurred.summary()["deletion_auc"],
        insertion_black=black.summary()["insertion_auc"],
    )


def measure_split(split: str, num_images: int, data_dir: str) -> Iterator[results.Row]:
    """A row for every map of the first images of a split."""
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    model.requires_grad_(False)
    images = dataset.load(data_dir, train=split == "training")[0][:num_images]
    classes = train.predict(model, images).argmax(dim=1)
    candidates = partial(candidate_maps, with_pairs=split == "training")
    kinds = dict(baseline=baseline_maps, candidate=candidates)
    for kind, make in kinds.items():
        for name, maps in tqdm(make(model, images, classes), desc=kind, disable=None):
            figures = measure(model, images, classes, maps)
            row = dict(split=split, images=len(images), kind=kind, map=name)
            yield row | {name: f"{figure:.4f}" for name, figure in figures.items()}


def merit(row: dict[str, str]) -> float:
    """What the default is chosen by, on the training images."""
    return float(row["insertion"]) - float(row["deletion"])


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("--num-images", type=int, help="of each split, for a quick try")
    args = parser.parse_args()
    set_threads()
    for split, size in SPLITS.items():
        rows = []
        if not args.table:
            rows = measure_split(split, args.num_images or size, args.data_dir)
        for row in rows:
            results.add(args.output, row, "split", "map")
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    default = method_name(METHOD, tuple(default_layers(model)))
    for split in SPLITS:
        rows = [row for row in results.read(args.output) if row["split"] == split]
        candidates = sorted((r for r in rows if r["kind"] == "candidate"), key=merit, reverse=True)
        others = [row for row in rows if row["kind"] != "candidate"]
        print(f"\n{split} images, best insertion minus deletion first, then baselines\n")
        results.print_table(candidates + others, COLUMNS, bold=("map", default))


if __name__ == "__main__":
    main()
