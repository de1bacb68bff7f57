"""Fashion-MNIST, or images of your own: from files to augmented batches.

    images, labels = load("data", train=True)  # uint8 (60000, 1, 28, 28), int64 (60000,)
    train, val = split_indices(labels, val_size=5000, seed=0)
    x = normalize(images[train[:128]])  # float32 (128, 1, 28, 28)

The data set: Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747.
"""

import gzip
import hashlib
import math
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.request import urlopen

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from tqdm.contrib.concurrent import thread_map

from common.files import UserError, user_path, whole_file

# Label 0 is the first.
CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
CLASS_NAMES += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGE_SIZE = 28  # pixels
CHANNELS = 1
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixel values scaled to [0, 1]
EASY_SHARE = 0.6  # of the images, see `epoch_order`
DISTORTED_SHARE = 0.125  # of images are rotated, as many are noisy; a share of 0.5 cost 0.5 points

# SHA-256 of the uncompressed files: Debian's compression differs.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
MIRRORS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_LIST = "classes.txt"  # beside the files of another data set


class DataInfo(NamedTuple):
    """What a model has to know about its data set."""

    class_names: tuple[str, ...] = CLASS_NAMES
    mean: float = MEAN
    std: float = STD


FASHION_MNIST = DataInfo()


# ---- The files ----


def _read(path: Path) -> bytes:
    """A file's content, unpacked if it is compressed, whatever its name; b"" if there is none."""
    if not path.is_file():
        return b""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):  # not compressed, or damaged
        return content


def _find(name: str, data_dir: Path) -> bytes | None:
    """A file's content, if the data folder or Debian's package has it; another's is refused."""
    for folder in (data_dir, data_dir / "FashionMNIST/raw", DEBIAN_FOLDER):  # raw: torchvision's
        for path in (folder / name, folder / f"{name}.gz"):
            content = _read(path)
            if hashlib.sha256(content).hexdigest() == FILES[name]:
                return content
            if content and folder != DEBIAN_FOLDER:
                what = f"{path} is damaged, or not of Fashion-MNIST: move it away, or"
                raise UserError(f"{what} write its classes to {folder / CLASS_LIST}, one a line")
    return None


def _from_mirror(mirror: str, name: str) -> dict[str, bytes]:
    """Download a file from the authors' server: {name: compressed content}."""
    url = f"{mirror}{name}.gz"
    print(f"dataset: downloading {url}", file=sys.stderr)
    with urlopen(url, timeout=20) as answer:  # seconds
        return {name: answer.read()}


def _from_apt() -> dict[str, bytes]:
    """Fetch all four files in Debian's package, without installing it."""
    with tempfile.TemporaryDirectory() as scratch:
        # The machine's package lists may be missing or old.
        apt = ("apt-get", "-o", f"Dir::State={scratch}", "-o", f"Dir::Cache={scratch}")
        unpack = ("sh", "-c", "dpkg-deb -x *.deb .")
        for command in ((*apt, "update"), (*apt, "download", DEBIAN_PACKAGE), unpack):
            subprocess.run(command, cwd=scratch, capture_output=True, check=True, timeout=300)
        folder = scratch / DEBIAN_FOLDER.relative_to("/")
        return {name: (folder / f"{name}.gz").read_bytes() for name in FILES}


def _fetch(name: str, data_dir: Path) -> bytes:
    """Fetch a file, keep it in `data_dir`, and return its content."""
    failures = []
    for source in (*MIRRORS, DEBIAN_PACKAGE):
        try:
            fetched = _from_apt() if source == DEBIAN_PACKAGE else _from_mirror(source, name)
            content = gzip.decompress(fetched[name])
            if hashlib.sha256(content).hexdigest() != FILES[name]:
                raise UserError("the download is not the published file")
        except Exception as error:  # the next source may work
            failures.append(str(error))
            continue
        for file, packed in fetched.items():
            path = data_dir / f"{file}.gz"
            if not _read(path):
                with whole_file(path) as copy:
                    copy.write(packed)
        return content
    problem = f"no good copy of {name} is in {data_dir} or could be fetched"
    advice = f"put the four .gz files of {SOURCE} there, or install Debian's {DEBIAN_PACKAGE}"
    raise UserError(f"{problem} ({'; '.join(failures)}): {advice}")


def load(
    data_dir: str | Path, train: bool, read_image: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Read the training or the test split; if there is no data, fetch Fashion-MNIST.

    Folders of pictures need `read_image`: from a path to uint8 (28, 28), or None if it cannot be
    read. Returns images, uint8 (N, 1, 28, 28), white on black, and labels, int64 (N,).
    """
    data_dir = user_path(data_dir)
    if folders := _class_folders(data_dir):
        return _read_pictures(folders, train, read_image)
    names = class_names(data_dir)
    split = "train" if train else "t10k"
    kinds = (("images-idx3", 0x803, [IMAGE_SIZE] * 2), ("labels-idx1", 0x801, []))
    tensors = []
    for kind, magic, sides in kinds:
        name = f"{split}-{kind}-ubyte"
        path = data_dir / name
        if names is CLASS_NAMES:
            content = _find(name, data_dir) or _fetch(name, data_dir)
        else:
            content = _read(path) or _read(data_dir / f"{name}.gz")
        start = 8 + 4 * len(sides)  # of the values
        found, *shape = struct.unpack(f">{start // 4}I", content[:start].ljust(start))
        size = len(content) - start
        if found != magic or shape[1:] != sides or not 0 < math.prod(shape) == size:
            raise UserError(f"{path} is missing, damaged or not of 28x28 pixels: make it anew")
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start)
        tensors.append(values.view(shape))
    images, labels = tensors
    if len(labels) != len(images) or labels.max() >= len(names):
        what = f"{len(labels):,} labels up to {labels.max()}"
        raise UserError(f"{path}: {what} do not fit {len(images):,} images, {len(names)} classes")
    return images.unsqueeze(1), labels.long()


# ---- Other data ----


def class_names(data_dir: str | Path) -> tuple[str, ...]:
    """Lines of classes.txt, names of folders of pictures, or Fashion-MNIST's."""
    path = user_path(data_dir)
    names = [folder.name for folder in _class_folders(path)]
    if (path / CLASS_LIST).exists():
        path = path / CLASS_LIST
        lines = path.read_text("utf-8-sig", "replace").rstrip().splitlines()
        names = [line.strip() for line in lines]
    elif not names:
        return CLASS_NAMES
    if len(set(names)) < max(2, len(names)) or "" in names:
        raise UserError(f"{path} has to name two classes or more, each by its own name")
    return tuple(names)


def describe(data_dir: str | Path, images: Tensor) -> DataInfo:
    """The classes, and the mean and deviation of all training images, uint8 (N, 1, 28, 28).

    Fashion-MNIST's classes come with its figures, so that its models can be trained further.
    """
    names = class_names(data_dir)
    if names == CLASS_NAMES:
        return FASHION_MNIST
    std, mean = torch.std_mean(images / 255)
    return DataInfo(names, round(mean.item(), 4), round(std.item(), 4))


def pictures_in(folder: Path) -> list[Path]:
    """A folder's own picture files, by name."""
    endings = {*Image.registered_extensions(), ".heic"}
    return [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in endings]


def _class_folders(data_dir: Path) -> list[Path]:
    """The folders of pictures, one for each class; none if there is other data."""
    if (data_dir / CLASS_LIST).exists() or any(data_dir.glob("*-ubyte*")):
        return []
    folders = [path for path in sorted(data_dir.glob("[!.]*")) if path.is_dir()]
    return folders if any(map(pictures_in, folders)) else []


def _read_pictures(folders: list[Path], train: bool, read_image: Callable) -> tuple[Tensor, Tensor]:
    """Four fifths of each class's pictures, or the others for the test, in random order."""
    drawn = []
    for label, folder in enumerate(folders):
        # A lot is the checksum of a name: added pictures move few others.
        lots = [(hashlib.sha256(p.name.encode()).digest(), p, label) for p in pictures_in(folder)]
        test_size = math.ceil(len(lots) / 5)
        drawn += sorted(lots)[test_size:] if train else sorted(lots)[:test_size]
    drawn.sort()
    paths = [path for _, path, _ in drawn]
    labels = [label for _, _, label in drawn]
    options = dict(max_workers=torch.get_num_threads(), desc="reading pictures", leave=False)
    images = thread_map(read_image, paths, **options)
    found = [i for i, image in enumerate(images) if image is not None]
    labels = torch.tensor(labels)[found]
    if len(labels.unique()) < len(folders):
        raise UserError(f"{folders[0].parent} has a class of too few pictures: add some")
    return torch.stack([torch.from_numpy(images[i]) for i in found]).unsqueeze(1), labels


# ---- Batches ----


def split_indices(
    labels: Tensor, val_size: int, seed: int, train_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Hold `val_size` of N images out for validation, every class in proportion.

    Returns two tensors of indices, int64, ascending: of the others, or of `train_size` of them, and
    of those held out.
    """
    if train_size:
        others, val = split_indices(labels, val_size, seed)
        return others[split_indices(labels[others], train_size, seed)[1]], val
    if val_size == 0:
        return torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    from sklearn.model_selection import train_test_split  # takes a second to load

    options = dict(test_size=val_size, random_state=seed, stratify=labels.tolist())
    train, val = train_test_split(range(len(labels)), **options)
    return torch.tensor(sorted(train)), torch.tensor(sorted(val))


def normalize(images: Tensor, data: DataInfo = FASHION_MNIST) -> Tensor:
    """Turn uint8 images (N, 1, 28, 28) into the float32 tensor that the model takes."""
    if images.dtype != torch.uint8 or images.shape[1:] != (CHANNELS, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"expected uint8 images (N, 1, 28, 28), not {images.dtype} {images.shape}")
    return images.float().div_(255).sub_(data.mean).div_(data.std)


# ---- Augmentation: batched, on the device, drawn from the given generator ----


def augment(images: Tensor, generator: Generator, config: SimpleNamespace) -> Tensor:
    """A random variant of each of the uint8 images (N, C, H, W), which are left as they are.

    The fields of `config` are settings in train.py.
    """
    if config.rotate:
        images = random_rotate(images, generator, config.rotate)
    if config.stretch > 1:
        images = random_stretch(images, generator, config.stretch)
    is_flipping = config.flip and not config.alternate_flip  # which flips them once an epoch
    if is_flipping:
        mirrored = _uniform(images, generator) < 0.5
    if config.shift:
        images = random_shift(images, generator, config.shift)
    if is_flipping:  # drawn before the shift, as in the runs that were measured
        images = torch.where(mirrored, images.flip(3), images)
    if config.noise:
        images = random_noise(images, generator, config.noise)
    if config.erase:
        images = random_erase(images, generator, config.erase, config.erase_area)
    return images


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    """A random number from [0, 1) for each image, (N, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)


def alternate_flip(images: Tensor, generator: Generator, epoch: int) -> Tensor:
    """Mirror a random half of uint8 images (N, C, H, W) in even epochs, and the others in odd ones.

    After Jordan 2024, arXiv 2404.00498; the generator has to be in the same state each time.
    """
    mirrored = _uniform(images, generator) < 0.5
    return torch.where(mirrored ^ bool(epoch % 2), images.flip(3), images)


def epoch_order(losses: Tensor, generator: Generator, skipped: int) -> Tensor:
    """A random order of images, int64 (N - skipped,), without some of those of lowest loss, (N,).

    After Qin et al. 2024, arXiv 2303.04947, without their weights and whole last epochs.
    """
    order = torch.randperm(len(losses), generator=generator, device=losses.device)
    easy = losses[order] <= losses.quantile(EASY_SHARE)
    left_out = easy.cumsum(0) * skipped // easy.sum()  # spread evenly: batches are alike
    return order[left_out.diff(prepend=left_out.new_zeros(1)) == 0]


def random_shift(images: Tensor, generator: Generator, pixels: int) -> Tensor:
    """Move each image (N, C, H, W) by up to `pixels` each way; what is uncovered becomes 0."""
    n, _, height, width = images.shape
    windows = F.pad(images, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * pixels + 1, (2, n), generator=generator, device=images.device)
    return windows[torch.arange(n, device=images.device), :, top, left]


def _strength(draw: Tensor) -> Tensor:
    """Spread a `DISTORTED_SHARE` of uniform numbers over [0, 1); the others become 0."""
    return ((draw - 1) / DISTORTED_SHARE + 1).clamp(min=0)


def random_rotate(images: Tensor, generator: Generator, degrees: float) -> Tensor:
    """Rotate some of the uint8 images (N, C, H, W), by uniformly -degrees to degrees."""
    draw = 2 * _uniform(images, generator).flatten() - 1
    angle = draw.sign() * _strength(draw.abs()) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _warp(images, [cos, -sin, zero, sin, cos, zero])


def random_stretch(images: Tensor, generator: Generator, most: float) -> Tensor:
    """Make garments (N, C, H, W) up to `most` times wider or narrower, and fill the frame."""
    wider = most ** (2 * _uniform(images, generator).flatten() - 1)
    width = (images > 0).any(dim=(1, 2)).sum(dim=1) * wider
    height = (images > 0).any(dim=(1, 3)).sum(dim=1)
    zoom = images.shape[3] / torch.maximum(width, height).clamp(min=1)
    zero = torch.zeros_like(zoom)
    return _warp(images, [1 / (zoom * wider), zero, zero, zero, 1 / zoom, zero])


def _warp(images: Tensor, matrix: list[Tensor]) -> Tensor:
    """Map uint8 images (N, C, H, W) by 2x3 matrices, of six tensors (N,), row by row."""
    matrices = torch.stack(matrix, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round_().byte()


def random_noise(images: Tensor, generator: Generator, deviation: float) -> Tensor:
    """Add noise to some uint8 images (N, C, H, W), of up to this standard deviation (1: white)."""
    deviations = 255 * deviation * _strength(_uniform(images, generator))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + deviations * noise).round().clamp(0, 255).byte()


def random_rectangles(
    images: Tensor, generator: Generator, probability: float, area: tuple[float, float]
) -> Tensor:
    """A mask, bool (N, 1, H, W), of a random rectangle in some of the images.

    Its area is uniform between two fractions of the image's, or what fits; one side is at most 3.3
    times the other.
    """
    n, _, height, width = images.shape
    draws = torch.rand(5, n, 1, 1, generator=generator, device=images.device)
    chance, size, aspect, top, left = draws
    size = (area[0] + size * (area[1] - area[0])) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(3.3))  # tall and wide are as likely
    box_height = (size * aspect).sqrt().round().clamp(max=height)
    box_width = (size / aspect).sqrt().round().clamp(max=width)
    top = (top * (height - box_height + 1)).floor()
    left = (left * (width - box_width + 1)).floor()
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    return (inside & (chance < probability)).unsqueeze(1)


def random_erase(images: Tensor, generator: Generator, probability: float, area: float) -> Tensor:
    """Fill a rectangle of some images with noise (Zhong et al. 2017, arXiv 1708.04896)."""
    inside = random_rectangles(images, generator, probability, (0.02, area))
    noise = torch.empty_like(images).random_(0, 256, generator=generator)
    return torch.where(inside, noise, images)


def cutmix(
    images: Tensor, targets: Tensor, generator: Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Fill a random rectangle from the previous image (Yun et al. 2019, arXiv 1905.04899).

    Targets, float (N, 10), are mixed by area. Unlike theirs, each image has its own rectangle.
    """
    inside = random_rectangles(images, generator, probability, (0.0, 1.0))
    share = inside.float().mean(dim=(1, 2, 3)).unsqueeze(1)
    return torch.where(inside, images.roll(1, 0), images), targets.lerp(targets.roll(1, 0), share)
