"""How often the answer for a photograph is right, and how well the note tells wrong answers.

    python benchmarks/photographs.py                              test images on eight backgrounds
    python benchmarks/photographs.py --held-out data/photographs  those that training held out
    python benchmarks/photographs.py --real FOLDER --list LIST    others, by kind

A list is a table of group, labels (accepted classes: Coat|Pullover), repository, and path; a
picture is FOLDER/repository/path. `--held-out` also shows what other limits of the note would do.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import results
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import dataset
from common.files import UserError
from dataset import CLASS_NAMES
from explaining.explanation import UNSURE, classify, model_name
from explaining.photo import read_image
from model import PHOTOGRAPHS_CHECKPOINT, SHIPPED_CHECKPOINT, load_checkpoint

Random = np.random.Generator
Picture = np.ndarray  # float (H, W, 3), RGB, 0 to 1
# uint8 images (N, 1, 28, 28); accepted classes, bool (N, 10); the groups that each belongs to
Photographs = tuple[Tensor, Tensor, list[tuple[str, ...]]]
SHAPE = 480, 360
LIMITS = 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9


# ---- Simulated photographs ----


def white(rng: Random) -> Picture:
    return np.ones((*SHAPE, 3))


def paper(rng: Random) -> Picture:
    return np.full((*SHAPE, 3), rng.uniform(0.3, 0.8, 3))


def blobs(rng: Random, height: float, width: float) -> Picture:
    """Smooth noise of deviation 1, in spots of about `height` by `width` pixels."""
    noise = rng.standard_normal((round(SHAPE[0] / height), round(SHAPE[1] / width)))
    noise = cv2.resize(noise, SHAPE[::-1], interpolation=cv2.INTER_CUBIC)
    return ((noise - noise.mean()) / noise.std())[..., None]


def wall_and_floor(rng: Random) -> Picture:
    picture = np.full((*SHAPE, 3), (0.85, 0.83, 0.78))
    picture[round(SHAPE[0] * rng.uniform(0.5, 0.75)) :] = (0.55, 0.42, 0.32)
    return picture


def wood(rng: Random) -> Picture:
    """Boards with a grain."""
    grain = 0.07 * blobs(rng, 4, 120) + 0.05 * blobs(rng, 30, 200)
    picture = np.array([0.62, 0.45, 0.30]) * (1 + grain)
    for edge in range(int(rng.uniform(20, 100)), SHAPE[0], 100):
        picture[edge : edge + 2] *= 0.6
    return picture


def grass(rng: Random) -> Picture:
    blades = 0.35 * blobs(rng, 12, 2.5) + 0.2 * blobs(rng, 60, 60)
    return np.array([0.33, 0.45, 0.16]) * (1 + blades).clip(0.3)


# The background, how much weaker the corners' light is, the noise, and black bars at the sides.
KINDS = {
    "white": (white, 0, 0, 0),
    "coloured paper": (paper, 0, 0, 0),
    "vignette of 25 %": (white, 0.25, 0, 0),
    "noise of 0.06": (white, 0, 0.06, 0),
    "black bars at the sides, 14 %": (white, 0, 0, 0.14),
    "wall and floor": (wall_and_floor, 0.1, 0.01, 0),
    "wood": (wood, 0.1, 0.01, 0),
    "grass": (grass, 0.25, 0.01, 0),
}


def cut_out(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 (28, 28), as an opaque garment: its values and its opacity, 0 to 1.

    A pixel at the edge is mixed with white: it gets its neighbours' value, and is transparent
    insofar as it is lighter. Small holes are white places of the garment.
    """
    value = image / 255
    square = np.ones((3, 3), np.uint8)
    inside = cv2.morphologyEx(np.uint8(image > 8), cv2.MORPH_CLOSE, square)
    core = cv2.erode(inside, square, borderType=cv2.BORDER_CONSTANT, borderValue=1) > 0
    spread = np.where(core, value, cv2.dilate(value, square))
    opacity = np.where(core, 1, value / np.maximum(spread, 1e-3)) * inside
    return spread, opacity.clip(0, 1)


def photograph(image: np.ndarray, kind: str, rng: Random) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3), of the garment of an image, uint8 (28, 28), inverted."""
    make_background, darker, noise, bars = KINDS[kind]
    picture = make_background(rng)
    value, opacity = cut_out(image)
    gray = 1 - value
    behind = picture.mean()
    if behind < 0.4 and (gray * opacity).sum() < (behind + 0.4) * opacity.sum():
        gray = value  # a light garment instead of a dark one that nobody would see
    tint = rng.uniform(-0.2, 0.2, 3) * (rng.random() < 0.5)
    garment = gray[..., None] + tint * np.minimum(gray, 1 - gray)[..., None]
    side = round(min(SHAPE) * rng.uniform(0.55, 0.9))
    layer = np.dstack([garment * opacity[..., None], opacity])
    layer = cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    top, left = (rng.integers(0, n - side + 1) for n in SHAPE)
    place = picture[top : top + side, left : left + side]
    place[:] = place * (1 - layer[..., 3:]) + layer[..., :3]
    y, x = np.mgrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    picture *= 1 - darker * (x**2 + y**2)[..., None] / 2
    picture += noise * rng.standard_normal(picture.shape)
    width = round(bars * SHAPE[1])
    picture = np.pad(picture, ((0, 0), (width, width), (0, 0)))
    return (picture * 255).round().clip(0, 255).astype(np.uint8)


def read_back(picture: np.ndarray, folder: Path) -> np.ndarray:
    """What `--image` makes of an RGB picture (H, W, 3): an image, uint8 (28, 28)."""
    Image.fromarray(picture).save(folder / "photograph.jpg", quality=85)
    return read_image(folder / "photograph.jpg")[0]


def simulate(data_dir: Path, count: int) -> Photographs:
    """Test images, as they are and on each background."""
    images, labels = dataset.load(data_dir, train=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    images = images[order, 0].numpy()
    made = {"as they are": images}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            rng = np.random.default_rng([0, *kind.encode()])
            made[kind] = [read_back(photograph(image, kind, rng), Path(folder)) for image in images]
    accepted = F.one_hot(labels[order], len(CLASS_NAMES)).bool().repeat(len(made), 1)
    groups = [(kind,) for kind in made for _ in images]
    return torch.from_numpy(np.concatenate(list(made.values())))[:, None], accepted, groups


# ---- Real photographs ----


def read_listed(folder: Path, path: Path) -> Photographs:
    """The photographs of a list, by kind and source."""
    rows = results.read(path)
    images = [read_image(folder / row["repository"] / row["path"])[0] for row in rows]
    accepted = torch.zeros(len(rows), len(CLASS_NAMES), dtype=torch.bool)
    groups = []
    for number, row in enumerate(rows):
        classes = [CLASS_NAMES.index(name) for name in row["labels"].split("|")]
        accepted[number, classes] = True
        source = "training's" if "clothing-dataset" in row["repository"] else "another's"
        groups.append((row["group"], f"{row['group']}, {source} source", "all listed"))
    return torch.from_numpy(np.stack(images))[:, None], accepted, groups


# ---- Figures ----


def figures(probability: np.ndarray, right: np.ndarray, limit: float) -> results.Row:
    """The share of right answers with its standard error, and what a note below a limit tells."""
    rate, noted = right.mean(), probability < limit
    row = dict(images=len(right), right=rate, error=(rate * (1 - rate) / len(right)) ** 0.5)
    precision = (~right)[noted].mean() if noted.any() else ""
    recall = noted[~right].mean() if not right.all() else ""
    return row | dict(limit=limit, noted=noted.mean(), precision=precision, recall=recall)


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each model and group; for all that were held out, one for each limit."""
    if args.held_out:
        if not (args.held_out / dataset.CLASS_LIST).exists():  # Fashion-MNIST would be loaded
            raise UserError(f"{args.held_out} is missing: make it by explaining/photographs.py")
        images, labels = dataset.load(args.held_out, train=False)
        accepted = F.one_hot(labels, len(CLASS_NAMES)).bool()
        groups = [(f"held out: {CLASS_NAMES[label]}", "all held out") for label in labels]
    elif args.real:
        images, accepted, groups = read_listed(args.real, args.list)
    else:
        images, accepted, groups = simulate(args.data_dir, args.num_images)
    for checkpoint in args.checkpoints:
        probabilities = classify(load_checkpoint(checkpoint)[0], images)
        probability, answer = probabilities.max(dim=1)
        right = accepted.gather(1, answer[:, None])[:, 0].numpy()
        for group in dict.fromkeys(name for names in groups for name in names):
            members = np.array([group in names for names in groups])
            for limit in LIMITS if group == "all held out" else [UNSURE]:
                row = figures(probability.numpy()[members], right[members], limit)
                yield dict(model=model_name(checkpoint), pictures=group) | row


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--num-images", type=int, default=150, help="of each background")
    add("--held-out", type=Path, help="folder that explaining/photographs.py made")
    add("--real", type=Path, help="a folder of photographs; with --list")
    add("--list", type=Path, help="what is in it")
    shipped = [SHIPPED_CHECKPOINT, PHOTOGRAPHS_CHECKPOINT]
    add("--checkpoints", type=Path, nargs="+", default=shipped)
    args = parser.parse_args()
    if args.real and not args.list:
        parser.error("--real needs --list")
    results.run(parser, measure, ("model", "pictures", "limit"))


if __name__ == "__main__":
    main()
