"""Damaged, foreign and hostile input, and full disks: what this project does with them.

    python benchmarks/hostile.py                       every case, as a row for each kind: some minutes
    python benchmarks/hostile.py checkpoints code      some kinds of: checkpoints, code, data, pictures, disks

Each case must end well ("fine") or be refused, in one line; any other end is BROKEN, is printed below the table, and
this script fails. Killed runs are in kill_resume.py.
"""

import argparse
import gzip
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kill_resume import HEAD, ROOT, RUN

import dataset
from common.files import UserError
from model import HybridClassifier, ModelConfig, load_checkpoint, save_checkpoint
from training.runs import reserve_folder

SMALL = ModelConfig((4, 8), (0, 1, 1), 16, 1, 2, mlp_ratio=2.0, pool="mean", drop_path=0.0, residual_unit="resnet")
Cases = Iterator[tuple[str, str, str]]  # what is tried, how it should end, how it ended


def attempt(function: Callable, *arguments: object) -> str:
    """How a call ends: "fine", "refused", or in words if neither."""
    try:
        function(*arguments)
        return "fine"
    except UserError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"not in one line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def script(name: str, *flags: object, lines: int = 1) -> str:
    """How one of the repository's scripts ends; to count as refused, it must print this many error lines."""
    command = [sys.executable, ROOT / name, *flags]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", timeout=300)
    is_refused = f"{name}: error: " in ended.stderr and len(ended.stderr.splitlines()) == lines
    words = "refused" if is_refused else f"exit status {ended.returncode}: {ended.stderr.strip()[-500:]}"
    return words if ended.returncode else "fine"


def make_checkpoint(path: Path) -> dict:
    """Save a good checkpoint of a small model with random weights, and return its content."""
    torch.manual_seed(0)
    save_checkpoint(path, HybridClassifier(SMALL), epoch=1, history=[], train_config=dict(val_size=0, seed=0))
    return torch.load(path, weights_only=True)


def saved(content: object, **options: object) -> bytes:
    """The file that torch.save makes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def mutated(content: bytes, generator: random.Random) -> bytes:
    """A damaged copy: some bits flipped, or a piece cut out, zeroed, doubled or random."""
    data, start = bytearray(content), generator.randrange(len(content))
    if generator.random() < 0.4:
        for _ in range(1 << generator.randrange(6)):  # half of them in the directory, which is small beside the weights
            place = generator.choice((generator.randrange(len(data)), -1 - generator.randrange(min(len(data), 8000))))
            data[place] ^= 1 << generator.randrange(8)
    else:
        end = min(len(data), start + generator.choice((1 << generator.randrange(16), len(data))))
        pieces = (b"", bytes(end - start), 2 * data[start:end], generator.randbytes(end - start))
        data[start:end] = generator.choice(pieces)
    return bytes(data)


def resealed(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An archive of torch.save with another pickle, and checksums that fit."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w") as archive:
        for entry in old.infolist():
            data = old.read(entry)
            archive.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return new.getvalue()


def mutated_checkpoints(good: Path, copies: int) -> Cases:
    """This many damaged copies, and a quarter as many whose pickle alone is damaged, with checksums that fit."""
    content, weights, path = good.read_bytes(), load_checkpoint(good)[0].state_dict(), good.with_name("mutated.pt")

    def load() -> None:
        loaded = load_checkpoint(path)[0].state_dict()
        assert i >= copies or all(torch.equal(loaded[name], weights[name]) for name in weights), "other weights"

    for i in range(copies + copies // 4):
        damage = partial(mutated, generator=random.Random(i))
        path.write_bytes(damage(content) if i < copies else resealed(content, damage))
        yield f"damaged copy {i}", "refused or fine", attempt(load)


def checkpoints(folder: Path, args: argparse.Namespace) -> Cases:
    """checkpoints: damaged (refused, or the same weights bit for bit), foreign, impossible"""
    good, path, inf = make_checkpoint(folder / "good.pt"), folder / "bad.pt", float("inf")
    yield "a good one", "fine", attempt(load_checkpoint, folder / "good.pt")
    yield "a path without a file", "refused", attempt(load_checkpoint, folder / "nothing.pt")
    yield "a folder", "refused", attempt(load_checkpoint, folder)
    files = {"nothing": b"", "text": b"epoch,loss\n" * 100, "another's": saved(torch.nn.Linear(784, 10).state_dict())}
    changes = [(None, "format", "another"), (None, "model_config", None), (None, "model", {})]
    changes += [("model", "head.weight", torch.zeros(11, 16)), ("model", "head.bias", [0]), ("model", "more", good)]
    values = dict(num_heads=(0, 3), embed_dim=("16", -16), stem_dims=(5, (4, 8, 9)), mlp_ratio=(-inf, inf), more=(1,))
    changes += [("model_config", name, value) for name in values for value in values[name]]
    for part, name, value in changes:
        changed = {name: value} if part is None else {part: good[part] | {name: value}}
        files[f"{part} {name} {value}"] = saved(good | changed)
    for name, content in files.items():
        path.write_bytes(content)
        yield name, "refused", attempt(load_checkpoint, path)
    yield "train.py with the last of these", "refused", script("train.py", "--evaluate", path)
    yield from mutated_checkpoints(folder / "good.pt", args.copies)


@dataclass
class Trap:
    """An object whose unpickling creates a file: what code in a checkpoint would do."""

    path: Path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def code(folder: Path, args: argparse.Namespace) -> Cases:
    """checkpoints with code in them, which must never be executed"""
    good, path, touched = make_checkpoint(folder / "good.pt"), folder / "last.pt", folder / "touched"
    path.write_bytes(saved(good | dict(trap=Trap(touched))))
    torch.load(path, weights_only=False)
    yield "the trap is real: careless loading runs it", "fine", "fine" if touched.exists() else "it is not"
    touched.unlink()
    pickled, old = pickle.dumps(Trap(touched)), saved(Trap(touched), _use_new_zipfile_serialization=False)
    for content in (pickled, old, resealed(path.read_bytes(), lambda _: pickled), path.read_bytes()):
        path.write_bytes(content)
        happened = attempt(load_checkpoint, path)
        yield "load_checkpoint", "refused", "its code was executed" if touched.exists() else happened
    run = ("--data-dir", args.data_dir, "--output-dir", folder / "run", *RUN)
    cases = (
        ("--evaluate", path),
        ("--resume", "--output-dir", folder),
        ("--teacher", path, *run),
        ("--checkpoint", path),
    )
    for flags in cases:
        happened = script("Visulization.py" if "--checkpoint" in flags else "train.py", *flags)
        yield f"{flags[0]}", "refused", "its code was executed" if touched.exists() else happened


def data(folder: Path, args: argparse.Namespace) -> Cases:
    """the data set: each file truncated, altered or swapped, without and with a good mirror; a bad mirror; nothing"""
    wanted = {train: dataset.load(args.data_dir, train) for train in (True, False)}
    contents = {name: dataset._find(name, args.data_dir) for name in dataset.FILES}
    damages = {  # what becomes of a file's content; the second is another file's
        "truncated": lambda content, other: content[:-1],
        "altered by one bit": lambda content, other: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        "swapped with another": lambda content, other: other,
    }
    home, mirror = folder / "home", folder / "mirror"
    mirror.mkdir()

    def load(train: bool) -> None:
        assert all(map(torch.equal, dataset.load(home, train), wanted[train])), "other images"

    with (  # no source but the folder and the mirror
        patch.object(dataset, "DEBIAN_FOLDER", Path("/nowhere")),
        patch.object(dataset.FashionMNIST, "mirrors", [f"{mirror.as_uri()}/"]),
        patch.dict(os.environ, PATH=""),
        redirect_stderr(io.StringIO()),
    ):
        yield "no files, no network", "refused", attempt(load, True)
        home.mkdir()
        for name, content in contents.items():
            (home / name).write_bytes(content)
        for (name, content), other in zip(contents.items(), list(contents.values())[::-1], strict=True):
            fetched, packed, is_train = mirror / f"{name}.gz", gzip.compress(content, 1), name.startswith("train")
            for damage, change in damages.items():
                (home / name).write_bytes(change(content, other))
                yield f"{name} {damage}, no mirror", "refused", attempt(load, is_train)
                fetched.write_bytes(packed[:-1])
                yield f"{name} {damage}, a bad mirror", "refused", attempt(load, is_train)
                fetched.write_bytes(packed)
                # What may be another data set is never replaced.
                expected = "fine" if damage == "truncated" else "refused"
                yield f"{name} {damage}, a good mirror", expected, attempt(load, is_train)
                fetched.unlink()
                (home / fetched.name).unlink(missing_ok=True)
            (home / name).write_bytes(content)


def pictures(folder: Path, args: argparse.Namespace) -> Cases:
    """pictures: none, damaged ones, a bomb, rare kinds, odd names"""
    from drawing.photo import read_image  # here, as the other kinds can be tried where OpenCV cannot be loaded

    def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
        picture.save(buffer := io.BytesIO(), kind, **options)
        return buffer.getvalue()

    image = Image.fromarray(255 - dataset.load(args.data_dir, train=False)[0][0, 0].numpy()).resize((280, 280))
    png, jpeg = encoded(image, "png"), encoded(image, "jpeg")
    bad = {
        "empty.png": b"",
        "text.png": b"<html><body>404 Not Found</body></html>",
        "truncated.jpg": jpeg[:3000],
        "truncated.png": png[: len(png) // 2],
        "flipped bit.png": png[:200] + bytes([png[200] ^ 1]) + png[201:],
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "transparent.png": encoded(Image.new("LA", (9, 9)), "png"),
        "one pixel.png": encoded(Image.new("L", (1, 1), 255), "png"),
        "225 million pixels in 30 KB.png": encoded(Image.new("1", (15_000, 15_000)), "png"),
    }
    exif = b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6"  # ends within the note on the orientation
    good = {"EXIF cut off.jpg": encoded(image, "jpeg", exif=exif), "CMYK.jpg": encoded(image.convert("CMYK"), "jpeg")}
    good |= {"16 bits.png": encoded(image.convert("I;16"), "png"), "line\nbreak.png": png}
    for name, content in (bad | good).items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")  # nobody writes to it
    paths = [folder, *(folder / name for name in ("nothing.png", "c" * 300, "pipe.png", *bad, *good))]
    for path in paths:
        yield path.name, "fine" if path.name in good else "refused", attempt(read_image, path)
    flags, lines = ("--output-dir", folder / "maps", "--image", *paths), len(paths) - len(good) + 1  # the last counts
    yield "Visulization.py with all of them", "refused", script("Visulization.py", *flags, lines=lines)


def disks(folder: Path, args: argparse.Namespace) -> Cases:
    """full and read-only disks, where all existing files stay intact; two runs into one folder"""
    disk, data_dir = folder / "disk", ("--data-dir", args.data_dir)

    def run(path: Path, *flags: object) -> str:
        return script("train.py", *data_dir, "--output-dir", path, *(flags or RUN))

    def maps() -> str:
        return script("Visulization.py", "--index", 0, *data_dir, "--output-dir", disk / "maps")

    with reserve_folder(folder / "busy"):
        yield "a second run into a folder", "refused", run(folder / "busy")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
        yield "a small disk", *["not tried: mounting one needs root on Linux"] * 2
        return
    try:
        yield "a run on a small disk", "fine", run(disk / "run")
        before = {path.name: path.read_bytes() for path in (disk / "run").glob("*.pt")}
        model = load_checkpoint(disk / "run" / "best.pt")[0]
        for left in range(len(before["best.pt"]) // 4096 * 4096 - 4096, -1, -4096):
            (disk / "fill").unlink(missing_ok=True)
            (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - left))
            yield f"room for {left} bytes", "refused", attempt(save_checkpoint, disk / "run" / "best.pt", model)
        yield "heatmaps on a full disk", "refused", maps()
        yield "another run on a full disk", "refused", run(disk / "run")
        after = {path.name.split("-")[-1]: path.read_bytes() for path in (disk / "run").glob("previous-1-*.pt")}
        yield "the first run's checkpoints", "fine", "fine" if after == before else "they are not as they were"
        yield "temporary files", "fine", "left" if any(disk.rglob("*.part")) else "fine"
        (disk / "fill").unlink()
        yield "again, with room", "fine", run(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield "a new run on a read-only disk", "refused", run(disk / "run")
        yield "going on with a run on a read-only disk", "refused", run(disk / "run", "--resume")
        yield "heatmaps on a read-only disk", "refused", maps()
        yield "evaluation on one", "fine", script("train.py", *data_dir, "--evaluate", disk / "run" / "best.pt")
    finally:
        subprocess.run(["umount", disk], check=True)


KINDS = dict(checkpoints=checkpoints, code=code, data=data, pictures=pictures, disks=disks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="which cases (default: all)")
    parser.add_argument("--copies", type=int, default=2000, help="of a checkpoint, to damage (default: 2000)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    broken: list[str] = []
    warnings.simplefilter("ignore")  # torch's, of odd tensors
    print(HEAD)
    for kind in args.kinds or KINDS:
        counts = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for what, expected, happened in KINDS[kind](Path(folder).resolve(), args):
                is_right = happened in expected.split(" or ")
                counts[happened if is_right else "BROKEN"] += 1
                broken += [] if is_right else [f"BROKEN: {kind}, {what}: {happened}, not {expected}"]
        said = ", ".join(f"{number:,} {name}" for name, number in counts.items())
        print(f"| {KINDS[kind].__doc__} | {counts.total():,} | {said} |", flush=True)
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
