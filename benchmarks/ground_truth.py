"""Heatmaps where the right answer is known: two marks of 4x4 pixels together decide the class.

    python benchmarks/ground_truth.py    train three models of the marks and measure: 10 minutes

On every image, three marks are planted at random places. Two have three kinds each, and
their pair is the class. The third, of ten kinds, decides nothing. Of a map for the right class:

- mass accuracy ↑: the share of its evidence on the two marks that decide (Arras et al. 2022, arXiv
  2003.07258); rank accuracy ↑: the share of as many hottest pixels; pointing game ↑: of the hottest
- weaker mark ↑: the share of evidence on the one of the two that has less
- third mark ↓: the share of evidence on the mark that decides nothing
- taken away ↓: the share at the first mark's place, for the same class, once the mark is not there
- max-sensitivity ↓: the largest relative change under small noise, as in Quantus (Yeh et al. 2019,
  arXiv 1901.09392)
- versus ↑: the share, with the right sign, on the second mark, against the class that differs in it
"""

import argparse
from collections.abc import Iterator
from functools import partial

import results
import torch
from captum.attr import IntegratedGradients, Occlusion, Saliency
from faithfulness import Candidate, Explainer, cam_of, default_of, in_parts
from torch import Tensor

import dataset
import train
from gradcam import GradCAM
from model import HybridClassifier

SIDE = 4  # pixels of a mark, both ways
CELL = 7  # an image has 4x4 cells; marks lie in different ones
SEEDS = 3
EPOCHS = 3
TRAIN_SIZE = 20_000
NUM_IMAGES = 100  # that a model is right on, of 2,000 test images
KINDS = (3, 3, 10)  # of the first, the second and the third mark
NOISE = 0.2  # of images with a deviation of 1, each way
DRAWS = 3


# ---- The images ----


def make_patterns() -> Tensor:
    """All marks, uint8 (16, 4, 4), half white and half black: equally bright."""
    noise = torch.rand(sum(KINDS), SIDE**2, generator=torch.Generator().manual_seed(0))
    white = noise.argsort(dim=1) < SIDE**2 // 2
    return (255 * white).byte().view(-1, SIDE, SIDE)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N,), the patterns (N, 3) of their marks, and the places (N, 3, 2), top and left."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randint(kinds, (n,), generator=generator) for kinds in KINDS)
    patterns = torch.stack([first, KINDS[0] + second, sum(KINDS[:2]) + third], dim=1)
    cells = torch.rand(n, 16, generator=generator).argsort(dim=1)[:, :3]
    corners = CELL * torch.stack([cells // 4, cells % 4], dim=2)
    shifts = torch.randint(CELL - SIDE + 1, (n, 3, 2), generator=generator)
    return KINDS[1] * first + second, patterns, corners + shifts


def plant(images: Tensor, marks: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of uint8 images (N, 1, 28, 28) with marks (N, M, 4, 4) at `places` (N, M, 2).

    Also returns where each mark is, bool (M, N, 28, 28).
    """
    rows = places[:, :, 0, None, None] + torch.arange(SIDE)[:, None]
    columns = places[:, :, 1, None, None] + torch.arange(SIDE)
    image = torch.arange(len(images))[:, None, None]
    images = images.clone()
    masks = torch.zeros(marks.shape[1], len(images), 28, 28, dtype=torch.bool)
    for i, mask in enumerate(masks):
        images[image, 0, rows[:, i], columns[:, i]] = marks[:, i]
        mask[image, rows[:, i], columns[:, i]] = True
    return images, masks


# ---- The maps ----


def explainers(model: HybridClassifier) -> dict[str, Explainer]:
    """What makes the maps, by name."""
    pair = "stem.stage0_0", "stem.down1"
    chosen = [Candidate("layercam", True, pair), default_of(model)]
    chosen += [Candidate("gradcam", False, ("stem.stage2_1",))]
    cams = {str(each): cam_of(model, each) for each in chosen}
    first = cams[str(chosen[0])]
    black = -dataset.MEAN / dataset.STD
    occlusion = partial(Occlusion(model).attribute, baselines=black, strides=(1, 3, 3))
    integrated = partial(IntegratedGradients(model).attribute, baselines=black, n_steps=20)
    gradients = Saliency(model).attribute
    window = (1, SIDE, SIDE)
    return cams | {
        "the first, and the mirror image's": lambda x, y: first(x, y) + first(x.flip(3), y).flip(2),
        "occlusion": lambda x, y: occlusion(x, window, target=y)[:, 0].relu(),
        "integrated gradients": lambda x, y: integrated(x, target=y)[:, 0].relu(),
        "input gradients": lambda x, y: gradients(x.requires_grad_(), target=y)[:, 0],
        "a random map": lambda x, y: torch.rand_like(x[:, 0]),
    }


def shares(explain: Explainer, x: Tensor, labels: Tensor) -> Tensor:
    """Maps (N, 28, 28) that add up to 1, but empty ones."""
    maps = in_parts(explain, x, labels).detach()
    return maps / maps.sum(dim=(1, 2), keepdim=True).clamp_min(1e-30)


# ---- The measures ----


def share_on(maps: Tensor, mask: Tensor) -> Tensor:
    """The share (N,) of each map's evidence that is on a mask, bool (N, 28, 28)."""
    return (maps * mask).sum(dim=(1, 2))


def share_of_hottest(maps: Tensor, mask: Tensor, count: int) -> Tensor:
    """The share of the hottest pixels that are on a mask."""
    places = maps.flatten(1).topk(count).indices
    return mask.flatten(1).gather(1, places).double().mean()


def max_sensitivity(explain: Explainer, x: Tensor, labels: Tensor) -> Tensor:
    """The mean of the maps' largest relative changes under some draws of noise."""
    maps = shares(explain, x, labels)
    changes = []
    for _ in range(DRAWS):
        noise = NOISE * (2 * torch.rand_like(x) - 1)
        change = shares(explain, x + noise, labels) - maps
        changes.append(change.norm(dim=(1, 2)))
    largest = torch.stack(changes).amax(dim=0)
    return (largest / maps.norm(dim=(1, 2)).clamp_min(1e-30)).mean()


def train_model(data_dir: str, seed: int) -> HybridClassifier:
    """The default recipe's model, trained on images with marks."""
    changes = dict(shift=0, erase=0.0, cutmix=0.0)  # nothing that hides marks
    changes |= dict(alternate_flip=False, whiten=False)  # both see the images without marks
    changes |= dict(skip_easy=0.0, label_smoothing=0.1)
    changes |= dict(epochs=EPOCHS, val_size=0, train_size=TRAIN_SIZE, seed=seed)
    run = train.start_run(results.settings(**changes, data_dir=data_dir, device="cpu"))
    run.labels, patterns, places = draw(len(run.images), seed)
    run.images, _ = plant(run.images, make_patterns()[patterns], places)
    for epoch in range(EPOCHS):
        train.train_epoch(run, epoch)
    return run.ema


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """Of each seed, rows of the test images that its model is right on."""
    images = dataset.load(args.data_dir, train=False)[0][:2000]
    labels, patterns, places = draw(len(images), seed=0)
    marks = make_patterns()[patterns]
    planted, masks = plant(images, marks, places)
    without, _ = plant(images, marks[:, 1:], places[:, 1:])
    for seed in range(SEEDS):
        model = train_model(args.data_dir, seed)
        right = train.predict(model, planted).argmax(dim=1) == labels
        i = right.nonzero().flatten()[:NUM_IMAGES]
        x, taken, y = dataset.normalize(planted[i]), dataset.normalize(without[i]), labels[i]
        first, second, _ = masks[:, i]
        other = y - y % KINDS[1] + (y + 1) % KINDS[1]  # another kind of the second mark
        for name, explain in explainers(model).items():
            torch.manual_seed(0)
            maps = shares(explain, x, y)
            on_first, on_second, on_third = (share_on(maps, mask) for mask in masks[:, i])
            row = dict(
                seed=seed,
                accuracy=right.double().mean(),
                heatmap=name,
                mass_accuracy=(on_first + on_second).mean(),
                rank_accuracy=share_of_hottest(maps, first | second, 2 * SIDE**2),
                pointing_game=share_of_hottest(maps, first | second, 1),
                weaker_mark=torch.minimum(on_first, on_second).mean(),
                third_mark=on_third.mean(),
                first_mark=on_first.mean(),
                taken_away=share_on(shares(explain, taken, y), first).mean(),
                max_sensitivity=max_sensitivity(explain, x[:20], y[:20]),
            )
            if isinstance(explain, GradCAM):
                contrast = explain(x, y, versus=other, normalize=False)
                row["versus"] = share_on(contrast.relu(), second).mean()
            yield row


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    results.run(parser, measure, ("seed", "heatmap"))


if __name__ == "__main__":
    main()
