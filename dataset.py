"""Fashion-MNIST: where it comes from, what it contains, and how a batch of it is made.

`load` finds or fetches the four files, checks every one of them, and returns a split as two tensors. From then on the
images live as one uint8 tensor on the training device, and a batch is an index and a few batched tensor operations:

    images, labels = load("data", train=True)            # uint8 (60000, 1, 28, 28), int64 (60000,)
    train, val = split_indices(labels, val_size=5000, seed=0)
    x = normalize(augment(images[train[:128]], generator))   # float32 (128, 1, 28, 28), what the model takes

The data set: Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv 1708.07747 (MIT licence).
"""

import glob
import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import download_url

CLASS_NAMES = tuple(FashionMNIST.classes)  # label 0 is the first
IMAGE_SIZE = 28  # pixels, both ways
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixel values scaled to [0, 1]

# SHA-256 of the four uncompressed files. The MD5 sums that the authors publish are those of their own .gz files;
# Debian compresses the same bytes again, so only the content can be compared.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MAX_FILE_BYTES = 48 << 20  # the largest of them has 47,040,016 bytes: reading stops here, whatever a file claims to be
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NETWORK_TIMEOUT = 20  # seconds without an answer


class DataError(RuntimeError):
    """The data set cannot be had or trusted; the message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing files: the data set's, and those of every other part of this project


def lock(handle: int) -> bool | None:
    """Take an open file or folder for this process until it is closed, or until the process ends in any way.

    Returns:
        True, or False if another process has it, or None where it cannot be known: on Windows, on some network drives.
    """
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    return None


def one_line(error: Exception) -> str:
    """What went wrong and what to do about it, on one line."""
    message = str(error)
    if isinstance(error, BrokenPipeError):
        message = "what reads the output has ended: let it read to the end, or write to a file"
    elif isinstance(error, OSError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror}; mend that, or name another file or folder"
    return " ".join(message.splitlines())


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write that gets its name when it is complete: at any moment `path` is the old file or the new one.

    Until then it has a name of its own, so that two processes may write the same file. If this process is killed
    meanwhile, the next one that writes `path` removes what is left (not on Windows, which has no such locks).

    Raises:
        OSError: it cannot be written; an older file is as it was.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    prefix = f".{path.name[:40]}."  # a name may be as long as the system allows, and this one is longer
    try:
        for left_behind in path.parent.glob(f"{glob.escape(prefix)}*.part"):
            with suppress(OSError), open(left_behind, "r+b") as file:  # network drives lock only what can be written
                if lock(file.fileno()):
                    left_behind.unlink(missing_ok=True)
        while True:
            handle, part = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
            file = os.fdopen(handle, "wb")
            if lock(handle) is not False and os.path.exists(part):
                break
            file.close()  # another process took it for left behind, in the moment before it was locked
        try:
            with file:
                yield file
                file.flush()
                os.fsync(handle)
                umask = os.umask(0o077)  # it can only be read by setting it
                os.umask(umask)
                with suppress(OSError):  # some drives have no such modes
                    os.chmod(part, 0o666 & ~umask)
                if fcntl:
                    os.replace(part, path)
            if not fcntl:  # Windows renames no open file
                os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; make room or choose another folder") from error


# ---------------------------------------------------------------------------------------------------------------------
# Getting the files. Each source ends in a folder that should hold the files, compressed or not.


def _from_mirrors(names: list[str], scratch: Path) -> Path:
    """Download the files from torchvision's mirrors into `scratch`."""
    for name in names:
        errors = []
        for mirror in FashionMNIST.mirrors:
            try:
                download_url(f"{mirror}{name}.gz", str(scratch))
                if hashlib.sha256(_read(scratch / f"{name}.gz")).hexdigest() == FILES[name]:
                    break
                errors.append(f"{mirror} sent something else")
            except (OSError, RuntimeError, HTTPException) as error:
                errors.append(f"{mirror}: {error}")
            (scratch / f"{name}.gz").unlink(missing_ok=True)
        else:
            raise DataError("; ".join(errors))
    return scratch


def _from_apt(names: list[str], scratch: Path) -> Path:
    """Fetch Debian's package with apt and unpack it into `scratch`; nothing is installed, so root is not needed."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise DataError("this machine has no apt")

    def run(*command: str) -> None:
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise DataError((result.stderr.strip() or f"{command[0]} failed").splitlines()[-1])

    def download(*options: str) -> None:
        run("apt-get", *options, "-o", "APT::Sandbox::User=root", "download", DEBIAN_PACKAGE)

    try:
        download()
    except DataError:  # the machine's own package lists may be missing or old: make private ones
        for folder in ("lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True, exist_ok=True)
        private = ("-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache")
        run("apt-get", *private, "-o", "APT::Sandbox::User=root", "update")
        download(*private)
    for package in scratch.glob("*.deb"):
        run("dpkg-deb", "-x", package.name, ".")
    return scratch / DEBIAN_FOLDER.relative_to("/")


def _has_content(path: Path, sha256: str) -> bool:
    """Whether a file exists and holds exactly the expected bytes."""
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _read(source: Path) -> bytes:
    """The content of a file, unpacked if it is compressed; empty if it cannot be read or unpacked."""
    try:
        with gzip.open(source) if source.suffix == ".gz" else open(source, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error):  # unreadable, truncated, not gzip at all
        return b""


def _take(folder: Path, name: str, target: Path) -> bool:
    """Put the file `name` from `folder`, compressed or not, at `target` if its content is right."""
    for source in (folder / name, folder / f"{name}.gz"):
        if source == target or not source.is_file():
            continue
        content = _read(source)
        if hashlib.sha256(content).hexdigest() != FILES[name]:
            _say(f"{source} is damaged: its content is not that of the published data set")
            continue
        with whole_file(target) as file:
            file.write(content)
        return True
    return False


def _say(message: str) -> None:
    print(f"dataset: {message}", file=sys.stderr, flush=True)


def prepare(data_dir: str | Path) -> None:
    """Make sure that the four files lie, checked, in `data_dir`/FashionMNIST/raw, where torchvision reads them.

    A file that is missing or damaged is fetched: from elsewhere in the data folder (`data_dir` itself, compressed or
    not), from Debian's package if that is installed, from torchvision's mirrors, or with apt.

    Raises:
        DataError: the folder cannot be written, or none of the four ways gave every file.
    """
    data_dir = Path(data_dir)
    raw = data_dir / FashionMNIST.__name__ / "raw"
    if (data_dir / FashionMNIST.__name__ / "processed").exists():
        raise DataError(
            f"{data_dir / FashionMNIST.__name__ / 'processed'} comes from an old torchvision, which would be read "
            f"unchecked: remove that folder and start again"
        )
    missing = [name for name, sha256 in FILES.items() if not _has_content(raw / name, sha256)]
    if not missing:
        return
    for name in missing:
        if (raw / name).exists():
            _say(f"{raw / name} is damaged: its content is not that of the published data set; getting it anew")

    sources: dict[str, Callable[[list[str], Path], Path]] = {
        f"the data folder {raw}": lambda names, scratch: raw,
        f"the data folder {data_dir}": lambda names, scratch: data_dir,
        f"Debian's package in {DEBIAN_FOLDER}": lambda names, scratch: DEBIAN_FOLDER,
        "torchvision's download mirrors": _from_mirrors,
        f"the package {DEBIAN_PACKAGE} fetched with apt": _from_apt,
    }
    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        for description, get_folder in sources.items():
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    folder = get_folder(missing, Path(scratch))
                except (DataError, OSError, subprocess.SubprocessError) as error:
                    failures.append(f"{description} ({str(error).splitlines()[0] if str(error) else 'failed'})")
                    continue
                taken = [name for name in missing if _take(folder, name, raw / name)]
            if taken:
                _say(f"{len(taken)} of {len(FILES)} files from {description}")
            missing = [name for name in missing if name not in taken]
            if not missing:
                return
            failures.append(f"{description} (lacks {', '.join(missing)})")
    except OSError as error:
        problem = f"cannot write to {raw}: {error.strerror}; choose another folder with --data-dir"
        raise DataError(problem if error.strerror else str(error)) from error
    finally:
        socket.setdefaulttimeout(timeout)
    raise DataError(
        f"Fashion-MNIST is not here and could not be fetched; tried {'; '.join(failures)}. "
        f"Put the four .gz files of https://github.com/zalandoresearch/fashion-mnist into {data_dir}, "
        f"or run 'apt-get install {DEBIAN_PACKAGE}'"
    )


# ---------------------------------------------------------------------------------------------------------------------
# From files to tensors


def load(data_dir: str | Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the training split (60,000 images) or the test split (10,000), fetching and checking the files first.

    Returns:
        images: uint8 tensor of shape (N, 1, 28, 28); 0 is the dark background.
        labels: int64 tensor of shape (N,), an index into `CLASS_NAMES`.

    Raises:
        DataError: the files cannot be had, see `prepare`.
    """
    prepare(data_dir)
    split = FashionMNIST(str(data_dir), train=train)
    return split.data.unsqueeze(1), split.targets


def split_indices(labels: torch.Tensor, val_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold `val_size` images out for validation, with every class in proportion; the same seed gives the same split.

    Args:
        labels: int64 tensor of shape (N,).
        val_size: 0 (nothing held out, train on everything), or from the number of classes to N minus that number.
        seed: any whole number from 0.

    Returns:
        Two int64 tensors of indices, both ascending: training and validation.

    Raises:
        ValueError: `val_size` is not one of those.
    """
    everything = np.arange(len(labels))
    if val_size == 0:
        return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
    train, val = train_test_split(everything, test_size=val_size, random_state=seed, stratify=labels.cpu().numpy())
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images of shape (N, 1, 28, 28) into the float32 tensor, mean 0 and deviation 1, that the model takes.

    Raises:
        ValueError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"expected uint8 images of shape (N, 1, {IMAGE_SIZE}, {IMAGE_SIZE}), "
            f"not {str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        )
    return images.float().div_(255).sub_(MEAN).div_(STD)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: batched, on the device, drawn from the given generator


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    flip: bool = True,
    shift: int = 2,
    erase: float = 0.25,
) -> torch.Tensor:
    """Draw a random variant of each image: mirrored, shifted, partly erased. Every image gets a draw of its own.

    Args:
        images: uint8 tensor of shape (N, 1, 28, 28), left as it is.
        generator: the source of randomness, on the images' device.
        flip: mirror half of the images, left to right.
        shift: move each by up to that many pixels each way, 0 to 27; what comes in is background.
        erase: probability, 0 to 1, that a rectangle of the image is replaced by noise (see `random_erase`).

    Returns:
        A uint8 tensor of the same shape.
    """
    n, _, height, width = images.shape
    device = images.device
    if flip or shift:
        # Every output pixel is one input pixel, so flip and shift are one look-up of rows and columns.
        rows = torch.arange(height, device=device).expand(n, height)
        columns = torch.arange(width, device=device).expand(n, width)
        if flip:
            mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        if shift:
            images = torch.nn.functional.pad(images, (shift, shift, shift, shift))
            offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator, device=device)
            rows, columns = rows + offsets[0], columns + offsets[1]
        image = torch.arange(n, device=device)
        images = images[image[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
    if erase:
        images = random_erase(images, generator, erase)
    return images


def random_erase(images: torch.Tensor, generator: torch.Generator, probability: float) -> torch.Tensor:
    """Replace a random rectangle by noise (Zhong et al. 2017, arXiv 1708.04896).

    It takes 2 to 33 % of the area; one side is at most 3.3 times the other.

    Args:
        images: uint8 tensor of shape (N, 1, H, W), left as it is.
        generator: the source of randomness, on the images' device.
        probability: that of an image to be changed, 0 to 1.

    Returns:
        A uint8 tensor of the same shape.
    """
    n, _, height, width = images.shape
    chance, area, aspect, top, left = torch.rand(5, n, 1, 1, generator=generator, device=images.device)
    area = (0.02 + area * (0.33 - 0.02)) * height * width
    aspect = torch.exp((2 * aspect - 1) * np.log(3.3).item())  # log-uniform, so that tall and wide are as likely
    box_height = (area * aspect).sqrt().round().clamp(max=height)
    box_width = (area / aspect).sqrt().round().clamp(max=width)
    top = (top * (height - box_height + 1)).floor()
    left = (left * (width - box_width + 1)).floor()
    y = torch.arange(height, device=images.device)[None, :, None]
    x = torch.arange(width, device=images.device)[None, None, :]
    inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    inside &= chance < probability
    noise = torch.randint(0, 256, images.shape, generator=generator, device=images.device, dtype=torch.uint8)
    return torch.where(inside.unsqueeze(1), noise, images)
