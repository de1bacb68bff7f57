"""How often the answer for a photograph is right, and how well the note tells wrong answers.

    python benchmarks/photographs.py                                  test images on backgrounds
    python benchmarks/photographs.py --archive data/photographs.npz   what training held out
    python benchmarks/photographs.py --real FOLDER --list LIST        others, by kind

A list is a table of group, labels (accepted classes: Coat|Pullover), repository, and path; a
picture is FOLDER/repository/path.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import results
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import dataset
from dataset import CLASS_NAMES
from explaining.explanation import UNSURE, classify, model_name
from explaining.photo import read_image
from explaining.photographs import read_table
from model import PHOTOGRAPHS_CHECKPOINT, SHIPPED_CHECKPOINT, load_checkpoint

Random = np.random.Generator
Picture = np.ndarray  # float (H, W, 3), RGB, 0 to 1
# uint8 images (N, 1, 28, 28); accepted classes, bool (N, 10); the groups that each belongs to
Photographs = tuple[Tensor, Tensor, list[tuple[str, ...]]]
SHAPE = 480, 360
LIMITS = 0.5, 0.6, 0.7, 0.8, 0.9  # of the note
COLUMNS = dict(
    model=("model", ""),
    pictures=("pictures", ""),
    images=("of", ""),
    right=("right", ".1%"),
    error=("±", ".1%"),
    limit=("note below", ".0%"),
    noted=("with a note", ".1%"),
    precision=("wrong of these", ".1%"),
    recall=("of all wrong", ".1%"),
)


# ---- Simulated photographs ----


def white(rng: Random) -> Picture:
    return np.ones((*SHAPE, 3))


def coloured_paper(rng: Random) -> Picture:
    return np.full((*SHAPE, 3), rng.uniform(0.3, 0.8, 3))


def blobs(rng: Random, height: float, width: float) -> Picture:
    """Smooth noise of deviation 1, in spots of about `height` by `width` pixels."""
    noise = rng.standard_normal((round(SHAPE[0] / height), round(SHAPE[1] / width)))
    noise = cv2.resize(noise, SHAPE[::-1], interpolation=cv2.INTER_CUBIC)
    return ((noise - noise.mean()) / noise.std())[..., None]


def wooden_boards(rng: Random) -> Picture:
    grain = 0.07 * blobs(rng, 4, 120) + 0.05 * blobs(rng, 30, 200)
    picture = np.array([0.62, 0.45, 0.30]) * (1 + grain)
    for edge in range(int(rng.uniform(20, 100)), SHAPE[0], 100):
        picture[edge : edge + 2] *= 0.6
    return picture


def grass(rng: Random) -> Picture:
    blades = 0.35 * blobs(rng, 12, 2.5) + 0.2 * blobs(rng, 60, 60)
    return np.array([0.33, 0.45, 0.16]) * (1 + blades).clip(0.3)


BACKGROUNDS = (white, coloured_paper, wooden_boards, grass)


def cut_out(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values, 0 to 1, of an image's garment, uint8 (28, 28), and where it is, 0 or 1."""
    square = np.ones((3, 3), np.uint8)
    inside = cv2.morphologyEx(np.uint8(image > 8), cv2.MORPH_CLOSE, square)
    core = cv2.erode(inside, square, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    # Pixels at the edge are mixed with white.
    value = np.where(core, image, cv2.dilate(image, square)) / 255
    return value, inside


def photograph(image: np.ndarray, make_background: Callable, rng: Random) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3), of an image's garment, uint8 (28, 28)."""
    picture = make_background(rng)
    value, inside = cut_out(image)
    gray, behind = 1 - value, picture.mean()
    if behind < 0.4 and np.average(gray, weights=inside) < behind + 0.4:
        gray = value  # a light garment instead of a dark one that nobody would see
    side = round(min(SHAPE) * rng.uniform(0.55, 0.9))
    layer = np.dstack([gray * inside, inside])
    layer = cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    top, left = (rng.integers(0, n - side + 1) for n in SHAPE)
    place = picture[top : top + side, left : left + side]
    place[:] = place * (1 - layer[..., 1:]) + layer[..., :1]
    y, x = np.mgrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    picture *= 1 - 0.1 * (x**2 + y**2)[..., None]  # the corners are darker
    picture += 0.01 * rng.standard_normal(picture.shape)
    return (255 * picture).round().clip(0, 255).astype(np.uint8)


def simulate(data_dir: Path, count: int) -> Photographs:
    """Test images, as they are and on backgrounds."""
    images, labels = dataset.load(data_dir, train=False)
    images, labels = images[:count, 0].numpy(), labels[:count]
    made = {"as they are": images}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photograph.jpg")
        for background in BACKGROUNDS:
            rng, found = np.random.default_rng(0), []
            for image in images:
                Image.fromarray(photograph(image, background, rng)).save(path, quality=85)
                found.append(read_image(path)[0])
            made[background.__name__] = found
    accepted = F.one_hot(labels, len(CLASS_NAMES)).bool().repeat(len(made), 1)
    groups = [(kind,) for kind in made for _ in images]
    return torch.from_numpy(np.concatenate(list(made.values())))[:, None], accepted, groups


# ---- Real photographs ----


def read_listed(folder: Path, path: Path) -> Photographs:
    """The photographs of a list, by kind and source."""
    rows = read_table(path)
    images = [read_image(folder / row["repository"] / row["path"])[0] for row in rows]
    accepted = torch.zeros(len(rows), len(CLASS_NAMES), dtype=torch.bool)
    groups = []
    for number, row in enumerate(rows):
        classes = [CLASS_NAMES.index(name) for name in row["labels"].split("|")]
        accepted[number, classes] = True
        source = "training's" if "clothing-dataset" in row["repository"] else "another's"
        groups.append((row["group"], f"{row['group']}, {source} source", "all listed"))
    return torch.from_numpy(np.stack(images))[:, None], accepted, groups


def read_held_out(path: Path) -> Photographs:
    """The photographs that an archive holds out, by class."""
    archive = np.load(path)
    images, labels = (archive[name][archive["held_out"]] for name in ("images", "labels"))
    accepted = F.one_hot(torch.from_numpy(labels).long(), len(CLASS_NAMES)).bool()
    groups = [(f"held out: {CLASS_NAMES[label]}", "all held out") for label in labels]
    return torch.from_numpy(images)[:, None], accepted, groups


# ---- Figures ----


def figures(probability: np.ndarray, right: np.ndarray, limit: float) -> results.Row:
    """The share of right answers with its standard error, and what a note below a limit tells."""
    rate, noted = right.mean(), probability < limit
    return dict(
        images=len(right),
        right=rate,
        error=(rate * (1 - rate) / len(right)) ** 0.5,
        limit=limit,
        noted=noted.mean(),
        precision=(~right)[noted].mean() if noted.any() else "",
        recall=noted[~right].mean() if not right.all() else "",
    )


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row for each model and group; for all held out, one for each limit."""
    if args.archive:
        images, accepted, groups = read_held_out(args.archive)
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
    add("--archive", type=Path, help="of explaining/photographs.py")
    add("--real", type=Path, help="a folder of photographs; with --list")
    add("--list", type=Path, help="what is in it")
    shipped = [SHIPPED_CHECKPOINT, PHOTOGRAPHS_CHECKPOINT]
    add("--checkpoints", type=Path, nargs="+", default=shipped)
    args = parser.parse_args()
    if args.real and not args.list:
        parser.error("--real needs --list")
    results.run(parser, measure, ("model", "pictures", "limit"), COLUMNS)


if __name__ == "__main__":
    main()
