"""What the background of a photograph costs: simulated ones, read as `--image` reads them.

    python benchmarks/photographs.py    300 images on each background, 1,000 strange pictures
    python benchmarks/photographs.py --real FOLDER --list LIST     real photographs, by kind
    python benchmarks/photographs.py --archive data/photographs.npz  those that training held out

A list is a table of group, labels (accepted classes: Coat|Pullover), repository, and path; a
picture is FOLDER/repository/path. Both can measure several --checkpoints. They also show how well
the answer's probability tells wrong answers.

An image is inverted, enlarged, made opaque, given a colour, and put on a background. Thresholds in
`explaining/photo.py` were chosen on training images, and not on grass. Life is harder: no garment
here is worn, folded or seen from the side, and none has more detail than 28x28 pixels.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import results
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

import dataset
import train
from explaining.features import familiarity_note, feature_statistics
from explaining.photo import read_image
from model import SHIPPED_CHECKPOINT, load_checkpoint

Random = np.random.Generator
Shape = tuple[int, int]
Picture = np.ndarray  # float32 (H, W, 3), RGB, 0 to 1; a light may be (H, W, 1)
Maker = Callable[[Shape, Random], Picture]
Finish = Callable[[Picture, Random], Picture]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SHAPES = (480, 360), (360, 480), (420, 420)
COLUMNS = dict(
    pictures=("", ""),
    images=("of", ""),
    right=("right", ".1%"),
    with_note=("with a note", ".1%"),
    advised=("with the right advice", ".1%"),
)


# ---- Backgrounds ----


def even(shape: Shape, color: tuple[float, ...]) -> Picture:
    return np.broadcast_to(np.array(color, np.float32), (*shape, 3)).copy()


def plain(*color: float) -> Maker:
    return lambda shape, rng: even(shape, color)


def blobs(shape: Shape, rng: Random, height: float, width: float) -> Picture:
    """Smooth noise of standard deviation 1 whose spots are about `height` by `width` pixels."""
    rows, columns = max(2, round(shape[0] / height)), max(2, round(shape[1] / width))
    noise = rng.standard_normal((rows, columns)).astype(np.float32)
    noise = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return ((noise - noise.mean()) / noise.std())[..., None]


def grey(shape: Shape, rng: Random) -> Picture:
    return even(shape, (rng.uniform(0.5, 0.75),) * 3)


def colored(shape: Shape, rng: Random) -> Picture:
    gray = np.full((1, 1), rng.uniform(0.4, 0.7), np.float32)
    return even(shape, tint(gray, rng, 0.3)[0, 0])


def wall_and_floor(shape: Shape, rng: Random) -> Picture:
    picture = even(shape, (0.85, 0.83, 0.78))
    edge = round(shape[0] * rng.uniform(0.5, 0.75))
    picture[edge:] = (0.55, 0.42, 0.32)
    return picture + 0.01 * blobs(shape, rng, 3, 9)


def wood(shape: Shape, rng: Random) -> Picture:
    """Boards with a grain, lengthwise or crosswise."""
    if rng.random() < 0.5:
        return wood(shape[::-1], rng).transpose(1, 0, 2)
    grain = 0.05 * blobs(shape, rng, 4, 120) + 0.03 * blobs(shape, rng, 2, 60)
    grain = grain + 0.03 * blobs(shape, rng, 30, 200)
    picture = np.array([0.62, 0.45, 0.30], np.float32) * (1 + 1.4 * grain)
    for edge in range(int(rng.uniform(20, 100)), shape[0], 100):
        picture[edge : edge + 2] *= 0.6
    return picture


def grass(shape: Shape, rng: Random) -> Picture:
    blades = 0.35 * blobs(shape, rng, 12, 2.5) + 0.2 * blobs(shape, rng, 60, 60)
    return np.array([0.33, 0.45, 0.16], np.float32) * (1 + blades).clip(0.3)


# ---- Light, noise and frames ----


def ramp(axis: int, low: float) -> Maker:
    """A light that falls evenly from 1 to `low`, downwards (axis 0) or to the right (axis 1)."""

    def make(shape: Shape, rng: Random) -> Picture:
        line = np.linspace(1, low, shape[axis], dtype=np.float32)
        return np.broadcast_to(np.expand_dims(line, 1 - axis), shape)[..., None]

    return make


def vignette(shape: Shape, rng: Random) -> Picture:
    """A light that is a quarter weaker in the corners."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j].astype(np.float32)
    return (1 - 0.25 * (x**2 + y**2) / 2)[..., None]


def noise(deviation: float) -> Finish:
    def add(picture: Picture, rng: Random) -> Picture:
        return picture + deviation * rng.standard_normal(picture.shape).astype(np.float32)

    return add


NO_NOISE = noise(0)


def frame(rows: int, columns: float) -> Finish:
    """Black bars above and below and at the sides: in pixels, or as a fraction if below 1."""

    def add(picture: Picture, rng: Random) -> Picture:
        width = columns if columns >= 1 else round(columns * picture.shape[1])
        return np.pad(picture, ((rows, rows), (width, width), (0, 0)))

    return add


WHITE = plain(1, 1, 1)


def setting(background: Maker, light: Maker = WHITE, finish: Finish = NO_NOISE) -> tuple:
    """The background, the light on it and the garment, and what happens to the picture then."""
    return background, light, finish


KINDS = {
    "white": setting(WHITE),
    "grey": setting(grey),
    "black": setting(plain(0, 0, 0)),
    "coloured paper": setting(colored),
    "gradient sideways, to 0.8": setting(WHITE, ramp(1, 0.8)),
    "vignette of 25 %": setting(WHITE, vignette),
    "noise of 0.06": setting(plain(0.95, 0.95, 0.95), finish=noise(0.06)),
    "frame of 2 pixels, black": setting(WHITE, finish=frame(2, 2)),
    "black bars at the sides, 14 %": setting(WHITE, finish=frame(0, 0.14)),
    "wall and floor": setting(wall_and_floor, ramp(1, 0.92), noise(0.01)),
    "wood": setting(wood, ramp(0, 0.9), noise(0.01)),
    "grass": setting(grass, vignette, noise(0.01)),
}


# ---- Photographs ----


def tint(gray: np.ndarray, rng: Random, strength: float) -> Picture:
    """Give grey values, float (H, W), a random colour, and leave their brightness as it is."""
    color = rng.uniform(-1, 1, 3).astype(np.float32)
    color -= color @ LUMA
    color *= strength / max(np.abs(color).max(), 1e-6)
    room = np.minimum(gray, 1 - gray)[..., None] / strength
    return gray[..., None] + color * np.minimum(room, 1)


def cut_out(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 (28, 28), as an opaque garment: its values and its opacity, 0 to 1.

    A pixel at the edge is a mixture of garment and white; it gets its neighbours' value, and is
    transparent insofar as it is lighter. Holes of a few pixels are white places of the garment.
    """
    value = image.astype(np.float32) / 255
    inside = (image > 8).astype(np.uint8)
    count, holes, sizes, _ = cv2.connectedComponentsWithStats(1 - inside, connectivity=4)
    for hole in range(1, count):
        if sizes[hole, cv2.CC_STAT_AREA] <= 12:
            inside[holes == hole] = 1
    square = np.ones((3, 3), np.uint8)
    core = cv2.erode(inside, square, borderType=cv2.BORDER_CONSTANT, borderValue=1) > 0
    spread = np.where(core, value, cv2.dilate(value, square))
    opacity = np.where(core, 1, value / np.maximum(spread, 1e-3)) * inside
    return spread, opacity.clip(0, 1).astype(np.float32)


def photograph(image: np.ndarray, kind: str, rng: Random) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3), of the garment of an image, uint8 (28, 28)."""
    make_background, make_light, finish = KINDS[kind]
    shape = SHAPES[rng.integers(len(SHAPES))]
    picture = make_background(shape, rng)
    value, opacity = cut_out(image)
    darkness = float(picture.mean())
    reflects = 1 - value
    if darkness < 0.4 and (reflects * opacity).sum() < (darkness + 0.4) * opacity.sum():
        reflects = value  # a light garment instead of a dark one that nobody would see
    garment = np.repeat(reflects[..., None], 3, axis=2)
    if rng.random() < 0.5:
        garment = tint(reflects, rng, 0.2)
    side = round(min(shape) * rng.uniform(0.55, 0.9))
    layer = np.dstack([garment * opacity[..., None], opacity])
    layer = cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    top, left = (rng.integers(0, n - side + 1) for n in shape)
    place = picture[top : top + side, left : left + side]
    place[:] = place * (1 - layer[..., 3:]) + layer[..., :3]
    picture = finish(picture * make_light(shape, rng), rng)
    return (picture * 255).round().clip(0, 255).astype(np.uint8)


def strange_pictures(images: Tensor, rng: Random) -> dict[str, Tensor]:
    """Pictures that are no upright garment, as many of each kind as images (N, 1, 28, 28)."""
    strokes, crops = [], []
    for image in images[:, 0].numpy():
        corners = rng.integers(20, 92, (rng.integers(3, 6), 2)).astype(np.int32)
        canvas = np.zeros((112, 112), np.uint8)
        width = int(rng.integers(8, 14))  # a digit's
        cv2.polylines(canvas, [corners], False, 255, width, cv2.LINE_AA)
        strokes.append(cv2.resize(canvas, (28, 28), interpolation=cv2.INTER_AREA))
        side = rng.integers(8, 15)
        top, left = rng.integers(4, 25 - side, 2)
        crops.append(cv2.resize(image[top : top + side, left : left + side], (28, 28)))
    return {
        "test images as they are": images,
        "rotated to the left": images.rot90(1, (2, 3)),
        "upside down": images.rot90(2, (2, 3)),
        "rotated to the right": images.rot90(-1, (2, 3)),
        "strokes like a digit's": torch.from_numpy(np.stack(strokes))[:, None],
        "crops of 8 to 14 pixels": torch.from_numpy(np.stack(crops))[:, None],
        "noise": torch.from_numpy(rng.integers(0, 256, images.shape, dtype=np.uint8)),
    }


def read_back(picture: np.ndarray, folder: Path) -> tuple[np.ndarray, str]:
    """What `--image` makes of an RGB picture (H, W, 3): an image, uint8 (28, 28), and a note."""
    Image.fromarray(picture).save(folder / "photograph.jpg", quality=85)
    image, _, note = read_image(folder / "photograph.jpg")
    return image, note


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """How many photographs are classified correctly, and how many strange pictures get a note."""
    model, checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)
    config = checkpoint["train_config"]
    statistics = feature_statistics(SHIPPED_CHECKPOINT, model, config, args.data_dir)
    images, labels = dataset.load(args.data_dir, train=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    some, more = order[: args.num_images or 300], order[: args.num_images or 1000]

    def row_of(name: str, made: Tensor) -> results.Row:
        right = train.predict(model, made).argmax(dim=1) == labels[some]
        return dict(pictures=name, images=len(some), right=right.double().mean().item())

    yield row_of("as they are", images[some])
    for kind in KINDS:
        rng = np.random.default_rng([0, *kind.encode()])
        found, notes = [], []
        with tempfile.TemporaryDirectory() as folder:
            for image in images[some, 0].numpy():
                made, note = read_back(photograph(image, kind, rng), Path(folder))
                found.append(made)
                notes.append(note != "")
        row = row_of(kind, torch.from_numpy(np.stack(found))[:, None])
        yield row | dict(with_note=np.mean(notes))

    advice = {
        "rotated to the left": "90 degrees to the right",
        "upside down": "180 degrees",
        "rotated to the right": "90 degrees to the left",
    }
    for name, pictures in strange_pictures(images[more], np.random.default_rng(0)).items():
        notes = [familiarity_note(model, image, statistics) for image in pictures]
        row = dict(pictures=name, images=len(more), with_note=np.mean([n != "" for n in notes]))
        if name in advice:
            row["advised"] = np.mean([advice[name] in note for note in notes])
        yield row


# ---- Real photographs ----


def read_listed(folder: Path, path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Images, uint8 (N, 1, 28, 28), which classes are accepted, bool (N, 10), and the kinds."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    images = [read_image(folder / row["repository"] / row["path"])[0] for row in rows]
    accepted = torch.zeros(len(rows), len(dataset.CLASS_NAMES), dtype=torch.bool)
    for number, row in enumerate(rows):
        for name in row["labels"].split("|"):
            accepted[number, dataset.CLASS_NAMES.index(name)] = True
    kinds = []
    for row in rows:
        is_of_training = "clothing-dataset" in row["repository"]
        kinds.append(f"{row['group']}, {'training' if is_of_training else 'another'}'s source")
    return torch.from_numpy(np.stack(images))[:, None], accepted, kinds


def read_held_out(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """The same of the photographs that an archive holds out; their kinds are the classes."""
    archive = np.load(path)
    images, labels = (torch.from_numpy(archive[name]) for name in ("images", "labels"))
    is_held_out = torch.from_numpy(archive["held_out"])
    images, labels = images[is_held_out][:, None], labels[is_held_out].long()
    accepted = torch.nn.functional.one_hot(labels, len(dataset.CLASS_NAMES)).bool()
    return images, accepted, [dataset.CLASS_NAMES[label] for label in labels]


def share(right: np.ndarray) -> str:
    """How many are right, in per cent, with the binomial standard error."""
    rate = right.mean()
    error = (rate * (1 - rate) / len(right)) ** 0.5
    return f"{right.sum()}: {rate:.1%} ± {100 * error:.1f}"


def warning_rows(name: str, probability: np.ndarray, right: np.ndarray) -> list[results.Row]:
    """How well a note below some limits of the answer's probability tells wrong answers."""
    rows = []
    area = roc_auc_score(~right, -probability)
    for limit in (0.5, 0.6, 0.7, 0.8, 0.9):
        noted = probability < limit
        row = dict(checkpoint=name, area=area, limit=limit, noted=noted.mean())
        row["precision"] = (~right)[noted].mean() if noted.any() else ""
        rows.append(row | dict(recall=noted[~right].mean()))
    return rows


def print_real(args: argparse.Namespace) -> None:
    """Print the shares of right answers by kind, and what the probability tells."""
    if args.archive:
        images, accepted, kinds = read_held_out(args.archive)
    else:
        images, accepted, kinds = read_listed(args.real, args.list)
    kinds = np.array(kinds)
    groups = {kind: kinds == kind for kind in sorted(set(kinds))}
    general = np.array([kind.split(",")[0] for kind in kinds])
    groups |= {f"{kind}, all": general == kind for kind in sorted(set(general) - set(kinds))}
    groups["all"] = np.ones(len(kinds), bool)
    rows = [dict(kind=kind, pictures=members.sum()) for kind, members in groups.items()]
    warnings = []
    for checkpoint in args.checkpoints:
        probabilities = train.predict(load_checkpoint(checkpoint)[0], images).softmax(dim=1)
        probability, answer = probabilities.max(dim=1)
        right = accepted[torch.arange(len(answer)), answer].numpy()
        for row, members in zip(rows, groups.values(), strict=True):
            row[str(checkpoint)] = share(right[members])
        warnings += warning_rows(str(checkpoint), probability.numpy(), right)
    columns = dict(kind=("", ""), pictures=("pictures", ""))
    columns |= {str(path): (path.name, "") for path in args.checkpoints}
    results.print_table([{k: str(v) for k, v in row.items()} for row in rows], columns)
    print()
    columns = dict(checkpoint=("", "code"), area=("area under the curve", ".3f"))
    columns |= dict(limit=("note below", ".0%"), noted=("with a note", ".1%"))
    columns |= dict(precision=("wrong of these", ".1%"), recall=("of all wrong", ".1%"))
    results.print_table([{k: str(v) for k, v in row.items()} for row in warnings], columns)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--num-images", type=int, help="of each kind, for a quick try")
    add("--real", type=Path, help="a folder of real photographs; with --list")
    add("--list", type=Path, help="what is in it: group, labels, repository, path")
    add("--archive", type=Path, help="of explaining/photographs.py: its held-out photographs")
    add("--checkpoints", type=Path, nargs="+", default=[SHIPPED_CHECKPOINT])
    args = parser.parse_args()
    if args.real and not args.list:
        parser.error("--real needs --list, a table of what is in the folder")
    if args.archive or args.real:
        print_real(args)
    else:
        results.run(parser, measure, ("pictures",), COLUMNS)


if __name__ == "__main__":
    main()
