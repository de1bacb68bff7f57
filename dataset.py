"""Fashion-MNIST: where it comes from, what it contains, and how a batch of it is made.

`load` finds or fetches the four files, checks every one of them, and returns a split as two
tensors. From then on the images live as one uint8 tensor on the training device, and a batch is an
index and a few batched tensor operations:

    images, labels = load("data", train=True)  # uint8 (60000, 1, 28, 28), int64 (60000,)
    train, val = split_indices(labels, val_size=5000, seed=0)
    x = normalize(augment(images[train[:128]], generator))  # float32 (128, 1, 28, 28)

The data set: Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", arXiv 1708.07747 (MIT licence).
"""

import gzip
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST

from common.files import UserError, whole_file

CLASS_NAMES = tuple(FashionMNIST.classes)  # label 0 is the first
IMAGE_SIZE = 28  # pixels, both ways
EASY_SHARE = 0.6  # of the images, see `epoch_order`
# Of the images, are rotated and, drawn separately, noisy. Half of them cost 0.5 points.
DISTORTED_SHARE = 0.125
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixel values scaled to [0, 1]

# SHA-256 of the four uncompressed files. The MD5 sums that the authors publish are those of their
# own .gz files; Debian compresses the same bytes again, so only the content can be compared.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
GZIP_MAGIC = b"\x1f\x8b"  # how such files begin
IDX_MAGIC = b"\0\0\x08"  # bytes; the next one is the number of dimensions
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class DataError(UserError):
    """The data set cannot be found, fetched or trusted."""


FETCH_ERRORS = (DataError, OSError, ValueError, HTTPException, subprocess.SubprocessError)


# ---- Getting the files ---------------------------------------------------------------------------


def _say(message: str) -> None:
    print(f"dataset: {message}", file=sys.stderr, flush=True)


def _describe(content: bytes) -> str:
    """What a whole idx file holds, like "60000x28x28 values"; "" if it is none."""
    dimensions = content[3] if content[:3] == IDX_MAGIC and len(content) > 3 else 0
    header = 4 + 4 * dimensions
    if not dimensions or len(content) < header:
        return ""
    shape = np.frombuffer(content[4:header], ">i4").tolist()
    is_whole = len(content) == header + math.prod(shape)
    return f"{'x'.join(map(str, shape))} values" if is_whole else ""


def _read(source: Path) -> bytes | None:
    """A file's content, unpacked if it is compressed, whatever its name.

    None if it is missing, b"" if it is damaged. A DataError if it is there, but cannot be read.
    """
    try:
        content = source.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        advice = "make it readable, or give another --data-dir"
        raise DataError(f"cannot read {source}: {error.strerror}; {advice}") from error
    if not content.startswith(GZIP_MAGIC):
        return content if _describe(content) else b""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):  # its checksum is wrong, or it is truncated
        return b""


def _find(name: str, data_dir: Path) -> bytes | None:
    """A file's content as it was published, from the data folder or Debian's installed package.

    A DataError if the data folder has a whole file of this name with other content: nothing else is
    taken instead.
    """
    other = []
    torchvisions = data_dir / "FashionMNIST" / "raw"
    for folder in (data_dir, torchvisions, DEBIAN_FOLDER):
        if folder == DEBIAN_FOLDER and other:
            break
        for source in (folder / name, folder / f"{name}.gz"):
            content = _read(source)
            if content is None:
                continue
            if hashlib.sha256(content).hexdigest() == FILES[name]:
                return content
            if content and folder != DEBIAN_FOLDER:
                other.append(f"{source} ({_describe(content) or 'in another format'})")
            elif not content:
                _say(f"{source} is damaged: move it away")
    if other:
        what = "intact, but not of Fashion-MNIST (its SHA-256 is not in dataset.py)"
        advice = 'give another --data-dir, or see "Another data set" in README.md to train on it'
        raise DataError(f"{' and '.join(other)}: {what}; {advice}")
    return None


def _from_mirror(mirror: str, name: str, scratch: Path) -> Path:
    """Download a file from one of torchvision's mirrors into `scratch`."""
    _say(f"downloading {mirror}{name}.gz")
    with urlopen(f"{mirror}{name}.gz", timeout=20) as answer:  # seconds without an answer
        (scratch / f"{name}.gz").write_bytes(answer.read())
    return scratch / f"{name}.gz"


def _from_apt(name: str, scratch: Path) -> Path:
    """Fetch Debian's package with apt and unpack it into `scratch`, without installing it."""
    # It gets lists of its own: the machine's may be missing or old.
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = ("-o", "APT::Sandbox::User=root", "-o", f"Dir::State::lists={scratch}/lists")
    apt = ("apt-get", *options, "-o", f"Dir::Cache={scratch}/cache")
    for command in ((*apt, "update"), (*apt, "download", DEBIAN_PACKAGE)):
        subprocess.run(command, cwd=scratch, capture_output=True, check=True, timeout=300)
    (package,) = scratch.glob("*.deb")
    subprocess.run(
        ("dpkg-deb", "-x", package, scratch), capture_output=True, check=True, timeout=300
    )
    return scratch / DEBIAN_FOLDER.relative_to("/") / f"{name}.gz"


def _fetch(name: str, data_dir: Path) -> bytes:
    """Fetch a file, keep it in `data_dir` unless another has its name, and return its content."""
    failures = []
    for fetch in (*(partial(_from_mirror, mirror) for mirror in FashionMNIST.mirrors), _from_apt):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                fetched = fetch(name, Path(scratch))
                content = _read(fetched) or b""
                if hashlib.sha256(content).hexdigest() != FILES[name]:
                    raise DataError("the download is not the published file")
            except FETCH_ERRORS as error:
                failures.append(" ".join(str(error).split())[:200])
                continue
            for file in fetched.parent.glob("*-ubyte.gz"):  # Debian's package has all four
                if not _read(data_dir / file.name):
                    with whole_file(data_dir / file.name) as copy:
                        copy.write(file.read_bytes())
            return content
    way = f"put the four .gz files of {SOURCE} there, or run 'apt-get install {DEBIAN_PACKAGE}'"
    reasons = f"none could be fetched ({'; '.join(failures)})"
    raise DataError(f"no good copy of {name} is in {data_dir}, and {reasons}: {way}")


# ---- From files to tensors -----------------------------------------------------------------------


def load(data_dir: str | Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the training split (60,000 images) or the test split (10,000); fetch what is missing.

    The folder `data_dir` may hold the files compressed or not, and may be read-only. Debian's
    package is found where it is installed. What is not found is fetched into the folder.

    Returns:
        Images, uint8 (N, 1, 28, 28), 0 is the dark background; and labels, int64 (N,), indices of
        `CLASS_NAMES`.
    """
    data_dir, arrays = Path(os.path.expanduser(data_dir)), []
    # bytes before the values
    for name, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
        name = f"{'train' if train else 't10k'}-{name}"
        content = _find(name, data_dir) or _fetch(name, data_dir)
        arrays.append(np.frombuffer(content, np.uint8, offset=header).copy())
    images, labels = map(torch.from_numpy, arrays)
    return images.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE), labels.long()


def split_indices(
    labels: torch.Tensor, val_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold `val_size` images out for validation, every class in proportion.

    Takes labels, int64 (N,), and a size of 0 or from 10 to N - 10. Returns the indices of both
    parts, int64, ascending.
    """
    everything = np.arange(len(labels))
    if val_size == 0:
        return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
    train, val = train_test_split(
        everything, test_size=val_size, random_state=seed, stratify=labels.cpu().numpy()
    )
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images (N, 1, 28, 28) into the float32 tensor that the model takes."""
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE)
    ):
        raise ValueError(
            "expected uint8 images of shape (N, 1, 28, 28), not "
            f"{images.dtype} {tuple(images.shape)}"
        )
    return images.float().div_(255).sub_(MEAN).div_(STD)


# ---- Augmentation: batched, on the device, drawn from the given generator ------------------------


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    flip: bool = True,
    shift: int = 2,
    erase: float = 0.25,
    erase_area: float = 0.33,
    rotate: float = 0.0,
    noise: float = 0.0,
) -> torch.Tensor:
    """Draw a random variant of each image, of the same shape and type.

    Args:
        images: uint8 tensor of shape (N, C, H, W), left as it is.
        generator: the source of randomness, on the images' device.
        flip: mirror half of the images, left to right.
        shift: move each by up to that many pixels each way, 0 to 27; uncovered pixels become
            background.
        erase: probability, 0 to 1, that a rectangle of the image is replaced by noise (see
            `random_erase`).
        erase_area: the largest such rectangle, as a part of the image, 0.02 to 1.
        rotate: rotate some of the images by up to this many degrees either way.
        noise: add Gaussian noise to some of them, of a standard deviation up to this fraction of
            the range.
    """
    (n, _, height, width), device = images.shape, images.device
    if rotate:
        images = random_rotate(images, generator, rotate)
    if flip or shift:
        # Every output pixel is one input pixel, so flip and shift are one look-up of rows and
        # columns.
        rows = torch.arange(height, device=device).expand(n, height)
        columns = torch.arange(width, device=device).expand(n, width)
        if flip:
            mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        if shift:
            images = F.pad(images, (shift, shift, shift, shift))
            offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator, device=device)
            rows, columns = rows + offsets[0], columns + offsets[1]
        image = torch.arange(n, device=device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=device)[:, None, None]
        images = images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    if noise:
        images = random_noise(images, generator, noise)
    if erase:
        images = random_erase(images, generator, erase, erase_area)
    return images


def alternate_flip(images: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
    """Mirror a random half of uint8 images (N, 1, H, W) in even epochs, and the others in odd ones.

    So two epochs show every image both ways, which a random flip does for half of them (Jordan
    2024, arXiv 2404.00498, section 3.6). The generator must be in the same state each time.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(mirrored ^ bool(epoch % 2), images.flip(3), images)


def epoch_order(losses: torch.Tensor, generator: torch.Generator, skipped: int) -> torch.Tensor:
    """A random order of images, int64 (N - pruned,), without some of those of lowest loss, (N,).

    After Qin et al. 2024 (arXiv 2303.04947), who also raise the other easy images' weight, and end
    with whole epochs.
    """
    order = torch.randperm(len(losses), generator=generator, device=losses.device)
    easy = losses[order] <= losses.quantile(EASY_SHARE)
    left_out = easy.cumsum(0) * skipped // easy.sum()  # how many up to each place: evenly spread
    return order[left_out.diff(prepend=left_out.new_zeros(1)) == 0]


def random_rotate(images: torch.Tensor, generator: torch.Generator, degrees: float) -> torch.Tensor:
    """Rotate some of the uint8 images (N, C, H, W), by uniformly -degrees to degrees."""
    draw = 2 * torch.rand(len(images), generator=generator, device=images.device) - 1
    angle = (
        draw.sign()
        * ((draw.abs() - 1) / DISTORTED_SHARE + 1).clamp(min=0)
        * np.deg2rad(degrees).item()
    )
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # at 0 degrees nothing changes
    return F.grid_sample(images.float(), grid, align_corners=False).round_().byte()


def random_noise(
    images: torch.Tensor, generator: torch.Generator, deviation: float
) -> torch.Tensor:
    """Add Gaussian noise to some uint8 images (N, C, H, W), of a deviation from 0 to this."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    deviations = 255 * deviation * ((draw - 1) / DISTORTED_SHARE + 1).clamp(min=0)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return noise.mul_(deviations).add_(images).round_().clamp_(0, 255).byte()


def random_rectangles(
    images: torch.Tensor, generator: torch.Generator, probability: float, area: tuple[float, float]
) -> torch.Tensor:
    """A mask, bool (N, 1, H, W), of one random rectangle in some of the images.

    Its area is uniform between two fractions of the image's, or what fits; one side is at most 3.3
    times the other.
    """
    n, _, height, width = images.shape
    chance, size, aspect, top, left = torch.rand(
        5, n, 1, 1, generator=generator, device=images.device
    )
    size = (area[0] + size * (area[1] - area[0])) * height * width
    # log-uniform, so that tall and wide are as likely
    aspect = torch.exp((2 * aspect - 1) * np.log(3.3).item())
    box_height = (size * aspect).sqrt().round().clamp(max=height)
    box_width = (size / aspect).sqrt().round().clamp(max=width)
    top = (top * (height - box_height + 1)).floor()
    left = (left * (width - box_width + 1)).floor()
    y = torch.arange(height, device=images.device)[None, :, None]
    x = torch.arange(width, device=images.device)[None, None, :]
    inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    return (inside & (chance < probability)).unsqueeze(1)


def random_erase(
    images: torch.Tensor, generator: torch.Generator, probability: float, area: float
) -> torch.Tensor:
    """Fill a random rectangle of uint8 images with noise (Zhong et al. 2017, arXiv 1708.04896).

    It takes from 2 % of the image to `area`, a fraction of it. `probability` is per image.
    """
    inside = random_rectangles(images, generator, probability, (0.02, area))
    noise = torch.randint(
        0, 256, images.shape, generator=generator, device=images.device, dtype=torch.uint8
    )
    return torch.where(inside, noise, images)


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill a random rectangle with the image before's (after Yun et al. 2019, arXiv 1905.04899).

    Takes uint8 images (N, 1, H, W) and targets, float (N, 10), mixed in proportion to the area.
    Unlike theirs, an image has its own rectangle, with this probability, of any size, wholly
    inside. The order of the batch has to be random.
    """
    inside = random_rectangles(images, generator, probability, (0.0, 1.0))
    share = inside.float().mean(dim=(1, 2, 3)).unsqueeze(1)
    return torch.where(inside, images.roll(1, 0), images), targets.lerp(targets.roll(1, 0), share)
