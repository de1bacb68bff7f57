"""Damaged, foreign and hostile input: what the two scripts do with it.

    python benchmarks/hostile.py                          every case: a table for each kind, then the summary
    python benchmarks/hostile.py checkpoints pictures     some kinds of: checkpoints, fuzz, positions, data, pictures,
                                                          flags, disk

Each case is one start of train.py or Visulization.py; the two of fuzz are 2,000 files each. It must end well, or be
refused: a non-zero exit status and one line on the error output that says what to do, without a traceback. Anything
else is called BROKEN, and this script fails. The memory is the largest that the process had. Killed runs are in
kill_resume.py.
"""

import argparse
import filecmp
import gzip
import io
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import train
from model import (
    CHECKPOINT_VERSION,
    HISTORY_COLUMNS,
    MAX_CHECKPOINT_BYTES,
    CheckpointError,
    HybridClassifier,
    ModelConfig,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
RAW = Path(dataset.FashionMNIST.__name__) / "raw"
SMALL = dict(stem_dims=(4, 8), stem_blocks=(0, 1, 1), embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0)
SHORT_RUN = """--train-size 640 --val-size 200 --epochs 2 --batch-size 64 --device cpu --precision float32 --quiet
    --stem-dims 4 8 --stem-blocks 0 1 1 --embed-dim 16 --depth 1 --num-heads 2""".split()
MUTATIONS = 2000  # of the fuzz test
# One of these is in each line that says what to do.
ADVICE = [*"choose give leave make mend name put remove scale start train use".split(), "number from"]


# ---------------------------------------------------------------------------------------------------------------------
# Running a case


@dataclass
class Outcome:
    """How a process ended: its exit status, what it printed, and the most memory it had, in MiB."""

    status: int
    output: str
    errors: str
    peak: float

    def refused(self) -> bool:
        """Whether it gave up in one line that is no traceback and says what to do."""
        lines = [line for line in self.errors.strip().splitlines() if not line.startswith("dataset: ")]  # what it does
        is_advice = any(f" {words} " in f" {lines[0].lower()} " for words in ADVICE) if lines else False
        return self.status > 0 and len(lines) == 1 and "error: " in lines[0] and is_advice


# Starts a command from a process that is small itself: a child's memory is counted from its parent's on.
LAUNCHER = """
import os, sys
pid = os.spawnvp(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
peak = usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1)
with open(sys.argv[1], "w") as file:
    print(os.waitstatus_to_exitcode(status), peak, file=file)
"""


def start(*command: object, cwd: Path) -> Outcome:
    """Run a command to its end."""
    with tempfile.NamedTemporaryFile("r") as result:
        launcher = [sys.executable, "-c", LAUNCHER, result.name, *map(str, command)]
        finished = subprocess.run(launcher, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=300)
        status, peak = result.read().split()
    return Outcome(int(status), finished.stdout, finished.stderr, int(peak) / 1024)


def script(name: str, *flags: object, cwd: Path) -> Outcome:
    """Run one of the repository's scripts."""
    return start(sys.executable, ROOT / name, *flags, cwd=cwd)


Row = tuple[str, str, str, float]  # the case, what happened, what was said, the most memory in MiB


def row(name: str, outcome: Outcome, expected: str, said: str = "") -> Row:
    """A line of a table; `expected` is "fine" or "refused"."""
    happened = "refused" if outcome.refused() else "fine" if outcome.status == 0 else "neither"
    if happened != expected:
        happened = f"BROKEN: {happened}, not {expected}, status {outcome.status}"
        said = outcome.errors.strip()[-1000:]
    return name, happened, said or outcome.errors.strip().split("error: ")[-1], outcome.peak


def not_tried(name: str) -> Row:
    """A line that says so."""
    return name, "not tried", "mounting a small disk takes root's rights on Linux", 0.0


def in_parallel(cases: Sequence, run: Callable) -> Iterator[tuple]:
    """Every case with its outcome, in order, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield from zip(cases, pool.map(run, cases), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Trap:
    """An object whose unpickling creates a file: what code in a checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def make_checkpoint(path: Path) -> None:
    """A good checkpoint of a small model with random weights."""
    torch.manual_seed(0)
    model = HybridClassifier(ModelConfig(**SMALL, pool="attention", drop_path=0.0))
    history = [dict.fromkeys(HISTORY_COLUMNS, 0.5) | dict(epoch=1)]
    save_checkpoint(path, model, epoch=1, history=history, train_config={})


def repacked(content: bytes, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of torch.save with another pickle, and check sums that fit."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for entry in old.infolist():
            data = old.read(entry)
            archive.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return new.getvalue()


def bad_checkpoints(good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that must be refused: what each is, and where; those of `Trap` would create folder/"touched"."""
    content = good.read_bytes()
    trap = Trap(folder / "touched")

    def write(name: str, data: bytes) -> tuple[str, Path]:
        path = folder / f"{name.replace(' ', '-').replace('/', '-')}.pt"
        path.write_bytes(data)
        return name, path

    def saved(name: str, **changes: object) -> tuple[str, Path]:
        buffer = io.BytesIO()
        torch.save(torch.load(good, weights_only=True) | changes, buffer)
        return write(name, buffer.getvalue())

    def config(**changes: object) -> dict:
        return dict(model_config=torch.load(good, weights_only=True)["model_config"] | changes)

    def weights(name: str, tensor: torch.Tensor) -> dict:
        return dict(model=torch.load(good, weights_only=True)["model"] | {name: tensor})

    yield "a path without a file", folder / "nothing.pt"
    yield "a folder", folder
    yield write("an empty file", b"")
    for part in range(1, 16):
        yield write(f"truncated at {part}/16", content[: len(content) * part // 16])
    generator = random.Random(0)
    for number in (1, 4, 16, 64):
        flipped = bytearray(content)
        for place in generator.sample(range(len(content)), number):
            flipped[place] ^= 1 << generator.randrange(8)
        yield write(f"{number} random bits flipped", bytes(flipped))
    place = content.index(torch.load(good, weights_only=True)["model"]["head.weight"].numpy().tobytes())
    yield write("one bit of one weight flipped", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    yield write("text", b"epoch,loss\n1,0.5\n" * 100)
    yield write("a picture", (ROOT / "HeapImg" / "average.png").read_bytes())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("letter.txt", "Dear reader")
    yield write("a zip archive of a text", archive.getvalue())
    yield write("a pickle that runs code", pickle.dumps(trap))
    buffer = io.BytesIO()
    torch.save(dict(torch.load(good, weights_only=True), trap=trap), buffer)
    yield write("a checkpoint that runs code", buffer.getvalue())
    buffer = io.BytesIO()
    torch.save(trap, buffer, _use_new_zipfile_serialization=False)
    yield write("the old format of torch with code", buffer.getvalue())
    yield write(
        "a pickle of 100 bytes that asks for 64 GiB",
        repacked(content, lambda _: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."),
    )
    zeros = pickle.dumps(bytearray(1 << 28), protocol=5)
    packed = repacked(content, lambda _: zeros, zipfile.ZIP_DEFLATED)
    yield write("an archive of 300 KB that unpacks to 256 MiB", packed)
    listed = pickle.dumps(list(range(10_000)), protocol=2)[:-1] + b"q\x01ccollections\nOrderedDict\nq\x02"
    copies = listed + b"h\x02h\x01\x85R" * 10_000 + b"."
    yield write("a pickle that copies a list ten thousand times", repacked(content, lambda _: copies))
    states = b"\x80\x02ccollections\nOrderedDict\nq\x02)Rq\x03" + b"h\x02)R}X\x01\x00\x00\x00aK\x01sb" * 10_000 + b"."
    yield write("a pickle that gives ten thousand dictionaries a state", repacked(content, lambda _: states))
    yield write("five million empty dictionaries", repacked(content, lambda _: b"\x80\x02" + b"}" * 5_000_000 + b"."))
    nested = b"\x80\x02}N" + b"\x85" * 2_000_000 + b"Ns."
    yield write("two million tuples, one in the other", repacked(content, lambda _: nested))
    buffer = io.BytesIO()
    torch.save(torch.nn.Sequential(torch.nn.Linear(784, 100), torch.nn.Linear(100, 10)).state_dict(), buffer)
    yield write("the state dict of another model", buffer.getvalue())
    hidden = repacked(content, lambda _: b"\x80\x02" + b"}" * 4_000_000 + b".")
    double = two_directories(repacked(buffer.getvalue(), bytes), hidden)
    yield write("the same, with a second archive that only torch sees", double)
    yield saved("another project's checkpoint", format="something-else")
    yield saved("weights of another shape", **weights("head.weight", torch.zeros(11, 16)))
    yield saved("weights of another type", **weights("head.bias", torch.zeros(10, dtype=torch.long)))
    yield saved("a weight that is no tensor", **weights("head.bias", [0.0] * 10))
    yield saved("a missing weight", model={})
    yield saved("a weight too many", **weights("extra", torch.zeros(1)))
    yield saved("a weight that is not a number", **weights("head.bias", torch.full((10,), torch.nan)))
    yield saved("an infinite weight", **weights("head.bias", torch.full((10,), torch.inf)))
    yield saved("a configuration for 3 billion weights", **config(embed_dim=1024, num_heads=1, depth=256))
    yield saved("a configuration beyond all bounds", **config(embed_dim=10**12))
    yield saved("a configuration that is no model", **config(num_heads=3))
    yield saved("a configuration of lists in lists", **config(pool=[[[["mean"]]]]))
    wide = ModelConfig(**SMALL | dict(embed_dim=1024, num_heads=1, depth=64), pool="mean", drop_path=0.0)
    with torch.device("meta"):
        shapes = {name: (t.shape, t.dtype) for name, t in HybridClassifier(wide).state_dict().items()}
    one = {dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.long)}
    claimed = {name: one[dtype].expand(shape) for name, (shape, dtype) in shapes.items()}
    yield saved(
        "one number that stands for 2 GiB of weights",
        **config(**vars(wide) | dict(stem_dims=[4, 8], stem_blocks=[0, 1, 1])),
        model=claimed,
    )
    yield saved("a newer format version", version=CHECKPOINT_VERSION + 1)
    yield saved("an older format version", version=1)
    yield saved("a version that is a word", version="two")
    yield saved("a history that is none", history=[dict(epoch="one")])
    row = dict.fromkeys(HISTORY_COLUMNS, 0.5)
    yield saved("a history of numbers beyond all bounds", history=[row | dict(epoch=1, train_loss=10**400)])
    yield saved("a history with columns of its own", history=[row | {"epoch": 1, f"column {i}": 0} for i in range(3)])
    yield saved("settings that are none", train_config=[1, 2])
    large = folder / "large.pt"
    with open(large, "wb") as file:
        file.truncate(MAX_CHECKPOINT_BYTES + 1)
    yield "a file larger than any checkpoint", large


def checkpoints(folder: Path, data_dir: Path) -> Iterator[Row]:
    """checkpoints: damaged, foreign, that would run code, that ask for much memory"""
    good = folder / "good.pt"
    make_checkpoint(good)
    yield row("a good one", script("train.py", "--evaluate", good, "--data-dir", data_dir, cwd=folder), "fine")
    cases = list(bad_checkpoints(good, folder))
    for (name, _), outcome in in_parallel(cases, lambda case: script("train.py", "--evaluate", case[1], cwd=folder)):
        yield row(name, outcome, "refused")
    if (folder / "touched").exists():
        raise SystemExit("hostile.py: BROKEN: the code of a checkpoint was executed")
    model = load_checkpoint(good)[0]
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    save_checkpoint(folder / "huge.pt", model)
    for name, flags in (("train.py", ["--evaluate"]), ("Visulization.py", ["--index", 0, "--checkpoint"])):
        outcome = script(name, *flags, folder / "huge.pt", "--data-dir", data_dir, cwd=folder)
        yield row(f"{name}: weights so large that no answer is a number", outcome, "refused")
    yield row(
        "Visulization.py: a checkpoint that runs code",
        script("Visulization.py", "--checkpoint", folder / "a-checkpoint-that-runs-code.pt", cwd=folder),
        "refused",
    )


def two_directories(seen: bytes, hidden: bytes) -> bytes:
    """An archive that `zipfile` reads as the one and torch as the other: a directory of 64 bits each, one offset."""
    directories = []
    for content, start in ((hidden, 0), (seen, len(hidden))):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            first, number = archive.start_dir, len(archive.infolist())
        end = content.rindex(b"PK\5\6")
        directory = bytearray(content[first:end])
        for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
            place = directory.index(entry.filename.encode()) - 4
            directory[place : place + 4] = struct.pack("<I", entry.header_offset + start)
        directories.append((bytes(directory), number))
    files = hidden + seen
    records, end = b"", b""
    for directory, number in directories:
        offset = len(files) + len(records)
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(directory), offset)
        records += directory + end
    # The locator names the first record; the second lies right before the locator, where zipfile looks.
    first = len(files) + len(directories[0][0])
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, first, 1)
    return (
        files + records + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    )


def mutated(content: bytes, generator: random.Random) -> bytes:
    """A damaged copy: flipped bits, or a piece that is cut off, cut out, zeroed, doubled, or random."""
    data = bytearray(content)
    start = generator.randrange(len(data))
    length = min(len(data) - start, 1 << generator.randrange(16))
    kind = generator.choice(("bits", "bits", "bits", "end", "cut", "zeros", "double", "noise"))
    if kind == "bits":
        # Half of them in the archive's directory and pickle, which are small beside the weights.
        for _ in range(1 << generator.randrange(6)):
            place = generator.choice((generator.randrange(len(data)), -1 - generator.randrange(min(len(data), 8000))))
            data[place] ^= 1 << generator.randrange(8)
    elif kind == "end":
        del data[start:]
    elif kind == "cut":
        del data[start : start + length]
    elif kind == "zeros":
        data[start : start + length] = bytes(length)
    elif kind == "double":
        data[start:start] = data[start : start + length]
    else:
        data[start : start + length] = generator.randbytes(length)
    return bytes(data)


def fuzz(good: Path, number: int, resealed: bool, seed: int = 0) -> tuple[int, int]:
    """Load damaged copies of a checkpoint: each must be refused in one line, or come out with the same weights.

    Args:
        good: the checkpoint.
        number: of copies.
        resealed: damage the pickle alone and make check sums that fit, as a stranger could: then a copy that loads
            may have other weights.
        seed: of the damage.

    Returns:
        How many were refused, and how many were loaded.

    Raises:
        AssertionError: neither happened.
    """
    generator = random.Random(seed)
    content, whole = good.read_bytes(), load_checkpoint(good)[0].state_dict()
    path, loaded = good.with_name("mutated.pt"), 0
    for i in range(number):
        damage = partial(mutated, generator=generator)
        path.write_bytes(repacked(content, damage) if resealed else damage(content))
        try:
            weights = load_checkpoint(path)[0].state_dict()
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, f"mutation {i}: {error}"
            continue
        loaded += 1
        assert resealed or all(torch.equal(weights[name], whole[name]) for name in whole), f"mutation {i}"
    path.unlink()
    return number - loaded, loaded


def fuzzed_checkpoints(folder: Path, data_dir: Path) -> Iterator[Row]:
    """thousands of checkpoints with random damage"""
    make_checkpoint(folder / "good.pt")
    for name, resealed in (("damaged anywhere", "False"), ("a damaged pickle, check sums that fit", "True")):
        code = f"import hostile, pathlib; print(*hostile.fuzz(pathlib.Path('good.pt'), {MUTATIONS}, {resealed}))"
        code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); {code}"
        outcome = start(sys.executable, "-c", code, cwd=folder)
        said = "{} refused, {} loaded".format(*outcome.output.split() or "??")
        said += "" if resealed == "True" else " with the same weights, bit for bit"
        yield row(f"{MUTATIONS:,} checkpoints, {name}", outcome, "fine", said)


def bad_positions(folder: Path) -> Iterator[tuple[str, Path]]:
    """Runs that cannot be resumed: what is wrong with each, and its folder."""
    run = folder / "run"
    saved = torch.load(run / "last.pt", weights_only=True)

    def changed(name: str, position: dict | None = None, **changes: object) -> tuple[str, Path]:
        path = folder / name.replace(" ", "-")
        path.mkdir()
        torch.save(saved | dict(training=saved["training"] | (position or {})) | changes, path / "last.pt")
        return name, path

    momentum = {0: dict(momentum=torch.zeros(3))}
    weights, optimizers = saved["training"]["model"], saved["training"]["optimizers"]
    claimed = {i: dict(averages) for i, averages in optimizers[0]["state"].items()}
    claimed[0]["exp_avg"] = torch.zeros(1, dtype=torch.uint8).expand(1 << 30)
    yield changed("no position", training=None)
    yield changed("another optimiser", dict(optimizers=[]))
    yield changed(
        "averages of another shape", dict(optimizers=[saved["training"]["optimizers"][0], dict(state=momentum)])
    )
    yield changed("weights of another shape", dict(model=dict(saved["training"]["model"], pos_embed=torch.zeros(3))))
    yield changed("a step outside the run", dict(step=10**9))
    yield changed("an order of images that are none", dict(step=3, order=torch.full((640,), 10**6)))
    yield changed("a step that is a fraction", dict(step=1.5))
    yield changed("an epoch that is a tensor", dict(epoch=torch.tensor(2)))
    yield changed("an infinite time", dict(seconds=float("inf")))
    yield changed("an accuracy beyond all bounds", dict(best_accuracy=10**400))
    yield changed("processes that are a tensor", dict(processes=torch.tensor([1, 1])))
    yield changed("a weight that is not a number", dict(model={n: t * torch.nan for n, t in weights.items()}))
    yield changed(
        "one number that stands for 4 GiB of averages", dict(optimizers=[dict(state=claimed), *optimizers[1:]])
    )
    yield changed("no averages", dict(optimizers=[dict(state={}), *optimizers[1:]]))
    yield changed("a random generator's state of another length", dict(generator=torch.zeros(3, dtype=torch.uint8)))
    yield changed("a history of other epochs", history=[])
    odd = [("batch_size", 0), ("epochs", 10**9), ("lr", float("nan")), ("data_dir", 3), ("data_dir", "no such folder")]
    odd += [("optimizer", [1]), ("seed", torch.zeros(2, 2)), ("lr", [0.01]), ("stem_dims", 5), ("teacher", ["a\nb"])]
    for name, value in odd:
        yield changed(f"{name} {value}".replace("\n", ""), train_config=saved["train_config"] | {name: value})


def positions(folder: Path, data_dir: Path) -> Iterator[Row]:
    """positions and settings to resume that are of no run"""
    run = ["--data-dir", data_dir, "--output-dir", folder / "run", *SHORT_RUN]
    yield row("a short run to begin with", script("train.py", *run, cwd=folder), "fine")
    for name, path in bad_positions(folder):
        yield row(name, script("train.py", "--resume", "--output-dir", path, cwd=folder), "refused")


# ---------------------------------------------------------------------------------------------------------------------
# The data set

DAMAGE: dict[str, Callable[[bytes, bytes], bytes]] = {  # of a file's content; the second is another file's
    "truncated": lambda content, other: content[:-1],
    "one bit altered": lambda content, other: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "swapped with another": lambda content, other: other,
    "replaced by HTML": lambda content, other: b"<html><body>404 Not Found</body></html>",
}
# Starts a script with no other source of the data set than its own folder, whatever this machine has.
CUT_OFF = """
import os, runpy, sys, pathlib
sys.path.insert(0, {root!r})
os.environ["PATH"] = ""
import dataset
dataset.DEBIAN_FOLDER = pathlib.Path("/nowhere")
dataset.FashionMNIST.mirrors = ["http://127.0.0.1:9/"]
sys.argv = sys.argv[1:]
runpy.run_path(os.path.join({root!r}, sys.argv[0]), run_name="__main__")
"""


def damaged_data(folder: Path, data_dir: Path, name: str, damage: str) -> Path:
    """A copy of the data folder with one damaged file; the others are links."""
    raw = folder / RAW
    raw.mkdir(parents=True)
    for other in dataset.FILES:
        os.link(data_dir / RAW / other, raw / other)
    names = list(dataset.FILES)
    other = names[(names.index(name) + 1) % len(names)]
    content = DAMAGE[damage]((raw / name).read_bytes(), (raw / other).read_bytes())
    (raw / name).unlink()
    (raw / name).write_bytes(content)
    return folder


def data(folder: Path, data_dir: Path) -> Iterator[Row]:
    """the data set: each file truncated, altered, swapped, replaced; no network; read-only; two at once"""

    def train_on(path: Path, run: str) -> Outcome:
        code = CUT_OFF.format(root=str(ROOT))
        flags = ["--data-dir", path, "--output-dir", folder / "runs" / run, *SHORT_RUN, "--report-test"]
        return start(sys.executable, "-c", code, "train.py", *flags, cwd=folder)

    for number, (name, damage) in enumerate((name, damage) for name in dataset.FILES for damage in DAMAGE):
        path = damaged_data(folder / f"data{number}", data_dir, name, damage)
        outcome = train_on(path, f"{number}")
        if (folder / "runs" / f"{number}" / "last.pt").exists():
            raise SystemExit(f"hostile.py: BROKEN: trained on {name} {damage}")
        yield row(f"{name} {damage}, no other source", outcome, "refused")
        (path / f"{name}.gz").write_bytes(gzip.compress((data_dir / RAW / name).read_bytes(), 1))
        outcome = train_on(path, f"{number}")
        if not filecmp.cmp(path / RAW / name, data_dir / RAW / name, shallow=False):
            outcome.status = 1
        yield row("… with a good copy beside it", outcome, "fine", "repaired, then trained on")
        shutil.rmtree(path)
    yield row("no files, no network", train_on(folder / "empty", "empty"), "refused")
    with mounted(folder / "disk", "size=100m") as disk:
        if disk is None:
            yield not_tried("a read-only data folder")
        else:
            shutil.copytree(data_dir / RAW, disk / RAW)
            for name, expected, words in (("whole", "fine", "used as it is"), ("damaged", "refused", "")):
                if name == "damaged":
                    (disk / RAW / "t10k-labels-idx1-ubyte").write_bytes(b"")
                remount(disk, "ro")
                yield row(f"a read-only data folder, {name}", train_on(disk, f"read-only-{name}"), expected, words)
                remount(disk, "rw")
    for name in dataset.FILES:
        (folder / "both").mkdir(exist_ok=True)
        (folder / "both" / f"{name}.gz").write_bytes(gzip.compress((data_dir / RAW / name).read_bytes(), 1))
    for number, outcome in enumerate(in_parallel((0, 1), lambda n: train_on(folder / "both", f"both{n}"))):
        yield row(f"two processes that unpack the files at once, {number + 1}", outcome[1], "fine", "trained")
    left = sorted(path.name for path in (folder / "both" / RAW).iterdir())
    if left != sorted(dataset.FILES):
        raise SystemExit(f"hostile.py: BROKEN: two processes left {left}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file, with its length and check sum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def picture_bomb(side: int) -> bytes:
    """A black PNG file of side x side pixels, in a few KB: 1 bit a pixel, compressed."""
    packer = zlib.compressobj(9)
    row_of_pixels = bytes(1 + side // 8)
    packed = b"".join(packer.compress(row_of_pixels) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pieces = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in pieces)


def odd_pictures(folder: Path, garment: np.ndarray) -> Iterator[tuple[str, Path, str]]:
    """Pictures of a garment (28, 28) and things that are none: what each is, its file, and "fine" or "refused"."""
    large = Image.fromarray(255 - garment).resize((280, 280))
    deep = Image.fromarray(np.asarray(large).astype(np.uint16) * 257)
    clear = large.convert("RGBA")
    clear.putalpha(large.point(lambda gray: 255 if gray < 250 else 0))

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def save(name: str, picture: Image.Image, **options: object) -> Path:
        picture.save(folder / name, **options)
        return folder / name

    jpeg = save("whole.jpg", large.convert("RGB"))
    yield "a picture in colour", jpeg, "fine"
    yield "0 bytes", write("empty.png", b""), "refused"
    yield "text", write("text.png", b"not a picture\n"), "refused"
    yield "a truncated JPEG", write("cut.jpg", jpeg.read_bytes()[:3000]), "refused"
    png = save("whole.png", large).read_bytes()
    yield "a truncated PNG", write("cut.png", png[: len(png) // 2]), "refused"
    yield "a PNG with a flipped bit", write("bit.png", png[:200] + bytes([png[200] ^ 1]) + png[201:]), "refused"
    yield (
        "PostScript, which is a program",
        write("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "refused",
    )
    yield "a folder", folder, "refused"
    yield "a file that is not there", folder / "nothing.png", "refused"
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    yield "a pipe that nobody writes to", folder / "pipe.png", "refused"
    sparse = write("sparse.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
    os.truncate(sparse, 1 << 31)
    yield "a file of 2 GiB that takes 4 KB on the disk", sparse, "refused"
    clear_all = clear.copy()
    clear_all.putalpha(0)
    yield "transparent all over", save("nothing-to-see.png", clear_all), "refused"
    broken = b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6"  # ends within the note on the orientation
    yield "a JPEG whose EXIF is cut off", save("exif.jpg", large.convert("RGB"), exif=broken), "fine"
    yield "16 bits of grey", save("deep.png", deep), "fine"
    big_endian = np.asarray(deep).astype(">u2").tobytes()
    tags = [
        (256, 280),
        (257, 280),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 280),
        (279, len(big_endian)),
    ]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack(">2sHI", b"MM", 42, 8 + len(big_endian))
    yield "16 bits of grey, big end first", write("deep.tiff", header + big_endian + directory + bytes(4)), "fine"
    yield "floating point", save("float.tiff", Image.fromarray(np.asarray(large, np.float32) / 255)), "fine"
    yield "8 bits of grey", save("gray.png", large), "fine"
    yield "1 bit", save("bits.png", large.convert("1")), "fine"
    yield "palette", save("palette.png", large.convert("P")), "fine"
    yield "palette with transparency", save("palette.gif", clear.convert("P"), transparency=0), "fine"
    yield "alpha", save("alpha.png", clear), "fine"
    yield "CMYK", save("cmyk.jpg", large.convert("CMYK")), "fine"
    frames = [large.rotate(angle, fillcolor=255) for angle in (90, 180)]
    yield "an animated GIF", save("moving.gif", large, save_all=True, append_images=frames), "fine"
    yield "1x1", save("dot.png", Image.new("L", (1, 1), 255)), "refused"
    line = Image.new("L", (1, 5000), 255)
    line.paste(0, (0, 1000, 1, 4000))
    yield "1x5000", save("line.png", line), "fine"
    yield "5000x1", save("lying.png", line.rotate(90, expand=True)), "fine"
    yield "30,000x30,000 in a few KB", write("bomb.png", picture_bomb(30_000)), "refused"
    yield "15,000x15,000 in a few KB", write("half.png", picture_bomb(15_000)), "refused"
    yield "8,000x8,000, the largest", save("huge.jpg", large.convert("RGB").resize((8000, 8000))), "fine"
    yield "spaces in the name", save("my old shoe.png", large), "fine"
    yield "letters of other scripts in the name", save("обувь 靴 👟 ü.png", large), "fine"
    yield "a name that is a formula to matplotlib", save("$^$.png", large), "fine"
    yield "a name with a line break", save("a\nb.png", large), "fine"
    if sys.platform == "linux":
        odd = folder / os.fsdecode(b"sch\xfch.png")
        large.save(odd)
        yield "a name that is not UTF-8", odd, "fine"
    yield "a name of 200 letters", save(f"{'a' * 196}.png", large), "fine"
    yield "a name of 300 letters, longer than a file's can be", folder / ("c" * 300), "refused"
    yield "a name of 255 letters, too long for its heatmap's", save(f"{'b' * 251}.png", large), "fine"


def pictures(folder: Path, data_dir: Path) -> Iterator[Row]:
    """pictures of all kinds, damaged ones, bombs, odd names"""
    garment = dataset.load(data_dir, train=False)[0][0, 0].numpy()
    cases = list(odd_pictures(folder, garment))
    for (name, _, expected), outcome in in_parallel(
        cases, lambda case: script("Visulization.py", "--image", case[1], "--html", "--save-arrays", cwd=folder)
    ):
        lines = outcome.errors.strip().splitlines()
        if outcome.status == 1 and len(lines) == 2 and lines[1].endswith("1 of 1 pictures could not be explained"):
            outcome.errors = f"error: {lines[0].split(': ', 1)[1]}\n"  # the first line is the picture's own
        said = outcome.output.splitlines()[0].split(".png: ")[-1] if outcome.status == 0 else ""
        yield row(name, outcome, expected, said)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def flags(folder: Path, data_dir: Path) -> Iterator[Row]:
    """every number among the flags at 0, -1, not a number, text, and past its bound"""
    import Visulization  # here, since the other cases' makers are used where OpenCV cannot be loaded

    # A data folder that is refused, so that nothing is trained: then the flag was taken.
    trap = folder / "data"
    (trap / RAW.parent / "processed").mkdir(parents=True)
    numbers = [("train.py", name, *bounds) for name, bounds in train.RANGES.items()]
    numbers += [("Visulization.py", name, *bounds) for name, bounds in Visulization.RANGES.items()]
    cases = []
    for file, name, low, high in numbers:
        others = ["1"] * (len(train.DEFAULTS[name][0]) - 1) if name in ("stem_dims", "stem_blocks") else []
        for text in ("0", "-1", "nan", "many", str(high + 1)):
            flag = f"--{name.replace('_', '-')}"
            command = [flag, *others, text] if others or text != "-1" else [f"{flag}={text}"]
            is_good = text in ("0", "-1") and low <= int(text) <= high
            cases.append((f"{file} {flag} {text}", file, [*command, "--data-dir", trap], is_good, (flag, low, high)))
    for (name, _, _, is_good, (flag, low, high)), outcome in in_parallel(
        cases, lambda case: script(case[1], *case[2], cwd=folder)
    ):
        taken = "processed" in outcome.errors
        named = flag in outcome.errors and f"{low:,}" in outcome.errors and f"{high:,}" in outcome.errors
        if outcome.refused() and is_good and taken:
            yield name, "fine", "within its range: taken, on to the data", outcome.peak
        elif outcome.refused() and not is_good and named:
            yield row(name, outcome, "refused")
        else:
            yield row(name, outcome, "named with its range")


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path | None]:
    """A small file system in memory; None where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.name == "nt" or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, mode: str) -> None:
    """Make a mounted file system read-only ("ro") or writable ("rw")."""
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> None:
    """Leave so many bytes of room on a disk."""
    with open(folder / "fill", "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)


def strays(folder: Path) -> list[str]:
    """Temporary files in a folder."""
    return [path.name for path in folder.rglob("*.part")]


def disk(folder: Path, data_dir: Path) -> Iterator[Row]:
    """full disks, read-only folders, a folder that is deleted meanwhile, two runs into one, names that cannot be"""

    def run(path: Path, *flags: object) -> Outcome:
        return script("train.py", "--data-dir", data_dir, "--output-dir", path, *flags, cwd=folder)

    def checked(name: str, outcome: Outcome, expected: str, whole: list[Path], said: str = "") -> Row:
        for path in whole:
            load_checkpoint(path)
        if strays(folder):
            outcome.status = -1
        return row(name, outcome, expected, said)

    with mounted(folder / "disk", "size=4m") as disk:
        if disk is None:
            for name in ("a full disk", "a read-only folder"):
                yield not_tried(name)
        else:
            yield row("a run on a small disk", run(disk / "run", *SHORT_RUN), "fine")
            names = ("last.pt", "best.pt")
            earlier = [disk / "run" / name for name in names]
            before = [path.read_bytes() for path in earlier]
            fill(disk, left=100_000)
            outcome = run(disk / "run", *SHORT_RUN)
            earlier = [path.with_name(f"previous-1-{path.name}") for path in earlier]
            assert [path.read_bytes() for path in earlier] == before
            yield checked("less room than a checkpoint takes when another run saves", outcome, "refused", earlier)
            fill(disk)
            outcome = run(disk / "new", *SHORT_RUN)
            outcome.status = -1 if (disk / "new").exists() else outcome.status
            yield checked("the disk is full from the start", outcome, "refused", earlier)
            flags = ["--index", 0, "--data-dir", data_dir, "--output-dir", disk / "maps"]
            outcome = script("Visulization.py", *flags, cwd=folder)
            yield checked("the disk is full when heatmaps are written", outcome, "refused", earlier)
            (disk / "fill").unlink()
            outcome = run(disk / "run", *SHORT_RUN)
            whole = [disk / "run" / name for name in names]
            yield checked("again, with room", outcome, "fine", earlier + whole)
            remount(disk, "ro")
            for name, flags in (
                ("a new run in a read-only folder", SHORT_RUN),
                ("going on with a run in a read-only folder", ["--resume"]),
                ("evaluating a checkpoint in a read-only folder", ["--evaluate", whole[1]]),
            ):
                yield checked(name, run(disk / "run", *flags), "refused", earlier + whole)
            flags = ["--index", 0, "--data-dir", data_dir, "--output-dir", disk / "maps"]
            yield checked(
                "heatmaps in a read-only folder", script("Visulization.py", *flags, cwd=folder), "refused", []
            )
    for name, moment in (("meanwhile", "history.csv"), ("while a checkpoint is written there", ".last.pt.*.part")):
        with long_run(folder / "deleted", data_dir) as process:
            whole = [folder / "deleted" / name for name in ("best.pt", "last.pt")]
            while not list((folder / "deleted").glob(moment)) and process.poll() is None:
                pass
            (folder / "deleted").rename(folder / "gone")
            shutil.rmtree(folder / "gone")
            while not all(path.exists() for path in whole) and process.poll() is None:
                time.sleep(0.01)
            second = run(folder / "deleted", *SHORT_RUN)
            process.terminate()
            output, errors = process.communicate()
            expected = 128 + signal.SIGTERM  # it went on until it was told to stop
            outcome = Outcome(0 if process.returncode == expected else process.returncode, output, errors, 0)
            said = errors.strip().replace(f"{folder}/", "").removeprefix("train.py: ")
            yield checked(f"the folder is deleted {name}", outcome, "fine", whole, said)
            yield row("… then a second run into the new one", second, "refused")
        shutil.rmtree(folder / "deleted")
    with long_run(folder / "shared", data_dir):
        yield row("a second run into a folder that one writes to", run(folder / "shared", *SHORT_RUN), "refused")
    (folder / "file").write_text("")
    (folder / "ring").symlink_to("ring")
    long = "a" * 300
    cases = [("train.py", flag, long) for flag in ("--output-dir", "--data-dir", "--evaluate", "--teacher")]
    cases += [("Visulization.py", flag, long) for flag in ("--output-dir", "--data-dir", "--checkpoint")]
    cases += [("train.py", flag, "ring") for flag in ("--output-dir", "--data-dir", "--evaluate", "--teacher")]
    cases += [(name, "--output-dir", "file") for name in ("train.py", "Visulization.py")]
    what = {long: "300 letters", "ring": "a link to itself", "file": "a file"}
    for (name, flag, value), outcome in in_parallel(cases, lambda case: script(*case, cwd=folder)):
        outcome.errors = outcome.errors.replace(long, "aaa…")
        yield row(f"{name} {flag}: {what[value]}", outcome, "refused")


@contextmanager
def long_run(path: Path, data_dir: Path) -> Iterator[subprocess.Popen]:
    """A training run that has saved its first epoch and goes on; it is killed in the end."""
    command = [sys.executable, ROOT / "train.py", "--data-dir", data_dir, "--output-dir", path, *SHORT_RUN]
    process = subprocess.Popen(
        [*map(str, command), "--epochs", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (path / "history.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# The tables

KINDS: dict[str, Callable[[Path, Path], Iterator[Row]]] = dict(
    checkpoints=checkpoints,
    fuzz=fuzzed_checkpoints,
    positions=positions,
    data=data,
    pictures=pictures,
    flags=flags,
    disk=disk,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="which cases (default: all)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    data_dir = args.data_dir.absolute()
    dataset.prepare(data_dir)
    summary, broken = [], 0
    for kind in args.kinds or KINDS:
        print(f"\n### {kind}\n\n| case | what happened | what was said | MiB |\n|---|---|---|---:|", flush=True)
        counts, peak = Counter(), 0.0
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            for case, happened, said, memory in KINDS[kind](folder, data_dir):
                for path in (folder, ROOT):  # shorter, and the same on every machine
                    said = said.replace(f"{path}/", "").replace(str(path), ".")
                case, said = (text.replace("|", "\\|").replace("\n", " ") for text in (case, said))
                said = said if len(said) <= 200 else f"{said[:200]}…"
                print(f"| {case} | {happened} | {said} | {f'{memory:.0f}' if memory else 'not measured'} |", flush=True)
                counts[happened.split(":")[0]] += 1
                peak = max(peak, memory)
        broken += counts["BROKEN"]
        happened = ", ".join(f"{number} {name}" for name, number in counts.items())
        summary.append(f"| {KINDS[kind].__doc__} | {counts.total()} | {happened} | {peak:.0f} |")
    print("\n| what was tried | cases | what happened | MiB at most |\n|---|---:|---|---:|")
    print("\n".join(summary))
    if broken:
        raise SystemExit(f"hostile.py: error: {broken} cases are broken")


if __name__ == "__main__":
    main()
