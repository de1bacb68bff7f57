"""Do the heatmaps show what the model's decision rests on? Layers and methods against simple baselines.

    python benchmarks/faithfulness.py                                      print the tables of faithfulness.csv
    python benchmarks/faithfulness.py --split training --num-images 500    measure anew, on training images
    python benchmarks/faithfulness.py --split test                         the same on test images

The default of Visulization.py is chosen on training images, as none were held out from the shipped model, and reported
on test images. Every map is for the class that the model predicts, whose probability is followed:

- deletion: the hottest pixels turn black first; the mean probability over the shares of pixels gone. Low is good.
- insertion: the hottest pixels return first, on a blurred image; the mean probability. High is good. Both are
  RISE's (Petsiuk et al. 2018, arXiv 1806.07421), as is the blur; its code deletes to mean grey. Black deletion favours
  maps of the brightness, as black is the background here, so each measure is taken on the other canvas, too.
- average drop and increase: of the probability when the image is multiplied by the map (Grad-CAM++, arXiv 1710.11063).
- ROAD: the share of predictions kept when the hottest 20, 40, 60 and 80 % of pixels are replaced by what their
  neighbours suggest (Rong et al. 2022, arXiv 2202.00449); the mean of the four. Low is good.

The maps of an untrained model, two of the baselines, are for the class that this model itself predicts. The controls
are the default, two close candidates and a random map, blurred: how much of a score is owed to a map's being smooth.

The measures are those of the packages torchcam and quantus, the input gradients are captum's. They are computed in
bfloat16 where the CPU does, as training is; that moves the third decimal.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from captum.attr import Saliency
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
from torchvision.transforms import GaussianBlur, Normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seeds import save_table

import dataset
from gradcam import METHODS, GradCAM
from model import HybridClassifier, load_checkpoint
from training.processes import choose_precision, set_threads
from Visulization import METHOD, SHIPPED_CHECKPOINT, default_layers

from quantus import ROAD  # isort: skip - after Visulization, which says what to do where OpenCV cannot be loaded

TABLE = Path(__file__).resolve().parent / "faithfulness.csv"
STEPS = 14  # of deletion and insertion: two rows' worth of pixels each
BATCH_SIZE = 50  # what fits into a CPU's caches
GAUSSIAN_SIGMA = 7  # pixels
BLUR = GaussianBlur(19, sigma=3.0)  # pixels; the kernel ends at three sigma
ROAD_PERCENTAGES = [20, 40, 60, 80]
MEASURES = {  # column of the table: heading
    "deletion": "deletion ↓",
    "insertion": "insertion ↑",
    "road": "ROAD ↓",
    "average_drop": "average drop ↓",
    "increase": "increase ↑",
    "deletion_blurred": "deletion, blurred ↓",
    "insertion_black": "insertion, black ↑",
    "empty": "empty maps",
}


# ---------------------------------------------------------------------------------------------------------------------
# The maps, all float32 (N, 28, 28) and never negative


def cam_maps(
    model: HybridClassifier, layers: tuple[str, ...], method: str, images: torch.Tensor, classes: torch.Tensor | None
) -> torch.Tensor:
    """Heatmaps of uint8 images (N, 1, 28, 28) for one class each; None takes the predicted ones."""
    targets = [None] * len(images) if classes is None else classes.split(BATCH_SIZE)
    with GradCAM(model, layers, method) as cam:
        chunks = zip(images.split(BATCH_SIZE), targets, strict=False)
        return torch.cat([cam(dataset.normalize(chunk), target) for chunk, target in chunks])


def attention_rollout(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """How much of each token reaches the pooled vector: Abnar & Zuidema 2020, arXiv 2005.00928, section 3.

    The attention of each block, averaged over its heads, is mixed half and half with the shortcut's identity; the
    product of the blocks is read out with the weights of the pooling.
    """
    kept: dict[str, torch.Tensor] = {}
    parts = {f"{i}": block.attention.qkv for i, block in enumerate(model.blocks)}
    if model.pool.score is not None:
        parts["pool"] = model.pool.score
    hooks = [
        part.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
        for name, part in parts.items()
    ]
    rows = []
    with torch.no_grad():
        for chunk in images.split(BATCH_SIZE):
            model(dataset.normalize(chunk))
            tokens = model.pos_embed.shape[1]
            uniform = torch.full((len(chunk), tokens, 1), 1 / tokens)
            row = (kept["pool"].softmax(dim=1) if "pool" in kept else uniform).mT  # (N, 1, T)
            for i in reversed(range(len(model.blocks))):
                n, t, _ = kept[f"{i}"].shape
                q, k, _ = kept[f"{i}"].view(n, t, 3, model.config.num_heads, -1).permute(2, 0, 3, 1, 4)
                attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).mean(dim=1)
                row = row @ (attention + torch.eye(t)) / 2
            rows.append(row)
    for hook in hooks:
        hook.remove()
    side = int(model.pos_embed.shape[1] ** 0.5)
    grid = torch.cat(rows).view(-1, 1, side, side)
    return nn.functional.interpolate(grid, size=images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def baseline_maps(
    model: HybridClassifier, images: torch.Tensor, classes: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Maps that a good explanation must beat."""
    size = images.shape[-1]
    yield "a random map", torch.rand(len(images), size, size, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(size) - (size - 1) / 2
    gaussian = (-(distance[:, None] ** 2 + distance**2) / (2 * GAUSSIAN_SIGMA**2)).exp()
    yield "a centred Gaussian", gaussian.expand(len(images), -1, -1)
    yield "the image's brightness", images[:, 0].float() / 255
    saliency = Saliency(model).attribute
    chunks = zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True)
    yield (
        "input gradients",
        torch.cat([saliency(dataset.normalize(c).requires_grad_(), target=t)[:, 0].detach() for c, t in chunks]),
    )
    yield "attention rollout", attention_rollout(model, images)
    torch.manual_seed(0)
    untrained = HybridClassifier(model.config).eval()
    yield "Grad-CAM, untrained model", cam_maps(untrained, (model.stage_ends()[-1],), "gradcam", images, None)
    name = f"{method_name(METHOD, default_layers(model))}, untrained model"
    yield name, cam_maps(untrained, tuple(default_layers(model)), METHOD, images, None)


def control_maps(
    model: HybridClassifier, images: torch.Tensor, classes: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The default, its second layer alone with two methods, and a random map, all of them blurred."""
    default = default_layers(model)
    for method, layers in ((METHOD, default), (METHOD, default[1:]), ("gradcam++", default[1:])):
        yield f"{method_name(method, layers)}, blurred", BLUR(cam_maps(model, tuple(layers), method, images, classes))
    random = torch.rand(len(images), *images.shape[2:], generator=torch.Generator().manual_seed(0))
    yield "a random map, blurred", BLUR(random)


def method_name(method: str, layers: list[str] | tuple[str, ...]) -> str:
    """A candidate's name in the tables."""
    return f"{method} {' + '.join(layers)}"


def candidate_maps(
    model: HybridClassifier, images: torch.Tensor, classes: torch.Tensor, with_pairs: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The default layers, the ends of the stem's stages and the encoder's blocks, each with every method.

    And the default method with pairs of them: either all pairs, or only the default.
    """
    layers = [*default_layers(model), *model.stage_ends(), *(f"blocks.{i}" for i in range(len(model.blocks)))]
    layers = list(dict.fromkeys(layers))
    chosen = [(method, (layer,)) for method in METHODS for layer in layers]
    pairs = itertools.combinations(layers, 2) if with_pairs else [tuple(default_layers(model))]
    for method, names in [*chosen, *((METHOD, pair) for pair in pairs)]:
        maps = cam_maps(model, names, method, images, classes)
        if maps.any():  # HiResCAM finds no evidence in front of a layer norm, and ROAD takes no empty maps
            yield method_name(method, names), maps


# ---------------------------------------------------------------------------------------------------------------------
# The measures


class FixedMaps:
    """Ready-made maps, in the form of the extractor that torchcam's metrics ask for."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.maps = model, torch.empty(0)

    def __call__(self, class_idx: list[int] | None = None, scores: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[torch.Tensor]) -> torch.Tensor:
        return cams[0]

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


def measure(
    model: HybridClassifier, images: torch.Tensor, classes: torch.Tensor, maps: torch.Tensor
) -> dict[str, float]:
    """All measures of the maps (N, 28, 28) of uint8 images (N, 1, 28, 28) that the model puts into `classes` (N,)."""
    # The packages are given pixels from 0 to 1: what they leave out becomes black, not the data set's mean grey.
    from_pixels = nn.Sequential(Normalize([dataset.MEAN], [dataset.STD]), model).eval()
    from_pixels.register_forward_hook(lambda module, inputs, logits: logits.float())  # the packages take no bfloat16
    pixels = images.float() / 255
    maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    extractor = FixedMaps(from_pixels)
    softmax = partial(torch.softmax, dim=1)
    curves = partial(DeletionInsertionMetric, extractor, softmax, steps=STEPS, batch_size=BATCH_SIZE)
    black, blurred = curves(), curves(baseline=GaussianBlur(11, sigma=5.0))
    masked = ClassificationMetric(extractor, softmax)
    for i in range(0, len(images), BATCH_SIZE):
        extractor.maps = maps[i : i + BATCH_SIZE]
        for metric in (black, blurred, masked):
            metric.update(pixels[i : i + BATCH_SIZE], classes[i : i + BATCH_SIZE].tolist())
    np.random.seed(0)  # quantus draws from NumPy's own generator
    road = ROAD(percentages=ROAD_PERCENTAGES, noise=0.01, disable_warnings=True, display_progressbar=False)
    kept = road(
        model=from_pixels,
        x_batch=pixels.numpy(),
        y_batch=classes.numpy(),
        a_batch=maps[:, None].numpy(),
        device="cpu",
        batch_size=len(images),  # it reports its first batch alone
    )
    return {
        "deletion": black.summary()["deletion_auc"],
        "insertion": blurred.summary()["insertion_auc"],
        "road": sum(kept.values()) / len(kept),
        "average_drop": masked.summary()["avg_drop"],
        "increase": masked.summary()["conf_increase"],
        "deletion_blurred": blurred.summary()["deletion_auc"],
        "insertion_black": black.summary()["insertion_auc"],
        "empty": (maps.amax(dim=(1, 2)) == 0).double().mean().item(),
    }


def measure_split(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """One row for every map, of the first `args.num_images` images of a split."""
    model, _ = load_checkpoint(args.checkpoint)
    model.requires_grad_(False)
    images, _ = dataset.load(args.data_dir, train=args.split == "training")
    images = images[: args.num_images]  # the order of the data set is random
    with torch.no_grad():
        classes = torch.cat([model(dataset.normalize(chunk)).argmax(dim=1) for chunk in images.split(BATCH_SIZE)])
    candidates = partial(candidate_maps, with_pairs=args.split == "training")
    for kind, make in (("baseline", baseline_maps), ("control", control_maps), ("candidate", candidates)):
        for name, maps in tqdm(make(model, images, classes), desc=f"{kind}s", unit="map", disable=None):
            with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto", images.device) == "bfloat16"):
                figures = {key: f"{value:.4f}" for key, value in measure(model, images, classes, maps).items()}
            yield dict(split=args.split, images=str(len(images)), kind=kind, map=name) | figures


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def merit(row: dict[str, str]) -> float:
    """What the default is chosen by, on the training images."""
    return float(row["insertion"]) - float(row["deletion"])


def print_table(rows: list[dict[str, str]], default: str) -> None:
    """Print rows as a Markdown table, the default in bold."""
    print("| heatmap | " + " | ".join(MEASURES.values()) + " |")
    print("|---|" + "---:|" * len(MEASURES))
    for row in rows:
        cells = [row["map"]]
        for key in MEASURES:
            is_share = key in ("road", "average_drop", "increase", "empty")
            cells.append(f"{float(row[key]):.1%}" if is_share else f"{float(row[key]):.3f}")
        print("| " + " | ".join(f"**{cell}**" if row["map"] == default else cell for cell in cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("training", "test"), help="measure on images of this split")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output", type=Path, default=TABLE, help="the table to print and to add to")
    args = parser.parse_args()
    if args.split and args.checkpoint != SHIPPED_CHECKPOINT and args.output == TABLE:
        parser.error("the saved table is of the shipped checkpoint: give --output for another one's")
    set_threads()
    rows: list[dict[str, str]] = []
    if args.output.exists():
        with open(args.output, newline="") as file:
            rows = list(csv.DictReader(file))
    if args.split:
        measured: dict[str, dict[str, str]] = {}
        for row in measure_split(args):  # saved after each, as the whole takes long; an old row stays until its turn
            measured[row["map"]] = row
            old = [r for r in rows if r["split"] != args.split or r["map"] not in measured]
            save_table([*old, *measured.values()], args.output)
        rows = [r for r in rows if r["split"] != args.split] + list(measured.values())
        save_table(rows, args.output)
    model, _ = load_checkpoint(args.checkpoint)
    default = method_name(METHOD, default_layers(model))
    for split in ("training", "test"):
        candidates = sorted((r for r in rows if (r["split"], r["kind"]) == (split, "candidate")), key=merit)[::-1]
        others = [row for row in rows if row["split"] == split and row["kind"] != "candidate"]
        if not candidates:
            continue
        print(f"{candidates[0]['images']} {split} images, best insertion minus deletion first; baselines, controls\n")
        print_table(candidates + others, default)


if __name__ == "__main__":
    main()
