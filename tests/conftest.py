"""What the tests share: the real data set and a small one, and a small run."""

import signal
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import dataset
import train
from common.files import checksum
from model import SHIPPED_CHECKPOINT, HybridClassifier, ModelConfig, load_checkpoint
from training.settings import choose_settings, flag

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # some tests use its functions
SMALL_MODEL = ModelConfig(
    stem_dims=(4, 8),
    stem_blocks=(0, 1, 1),
    embed_dim=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2.0,
    pool="attention",
    drop_path=0.0,
    residual_unit="resnet",
)
# A run of half a second: ten steps an epoch. Two threads would only wait for each other.
SMALL_RUN = vars(SMALL_MODEL) | dict(
    train_size=160, val_size=100, epochs=2, batch_size=16, drop_path=0.2, cutmix=0.0
)
SMALL_RUN |= dict(skip_easy=0.0, alternate_flip=False, whiten=False)
SMALL_RUN |= dict(device="cpu", precision="float32", threads=1, quiet=True)
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a background job


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real data set, which is found on the machine or fetched into it once."""
    for is_train in (True, False):
        dataset.load(ROOT / "data", is_train)
    return ROOT / "data"


@pytest.fixture(scope="session")
def test_split(data_dir):
    return dataset.load(data_dir, train=False)


def write_data(folder, split, images, labels):
    """Write the files of a split ("train" or "t10k"); returns their names and SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = struct.pack(">4i", 0x803, len(images), 28, 28), struct.pack(">2i", 0x801, len(labels))
    paths = folder / f"{split}-images-idx3-ubyte", folder / f"{split}-labels-idx1-ubyte"
    paths[0].write_bytes(headers[0] + images.numpy().tobytes())
    paths[1].write_bytes(headers[1] + labels.byte().numpy().tobytes())
    return {path.name: checksum(path) for path in paths}


@pytest.fixture(scope="session")
def small_files(data_dir, tmp_path_factory):
    folder, hashes = tmp_path_factory.mktemp("small_data"), {}
    for split, size in (("train", 500), ("t10k", 100)):
        images, labels = dataset.load(data_dir, train=split == "train")
        hashes |= write_data(folder, split, images[:size], labels[:size])
    return folder, hashes


@pytest.fixture
def small_data(small_files, monkeypatch):
    """A folder with 500 training and 100 test images; they are the whole data set for a test."""
    monkeypatch.setattr(dataset, "FILES", small_files[1])
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", small_files[0])
    monkeypatch.setattr(dataset, "MIRRORS", [])
    return small_files[0]


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return HybridClassifier(SMALL_MODEL).eval()


@pytest.fixture(scope="session")
def shipped():
    return load_checkpoint(SHIPPED_CHECKPOINT)[0]


@pytest.fixture
def run_config(small_data, tmp_path):
    """Makes the configuration of a run that saves in the folder "run"."""

    def make(**changes):
        given = SMALL_RUN | dict(data_dir=str(small_data), output_dir=str(tmp_path / "run"))
        return choose_settings(train.SETTINGS, train.RECIPES, given | changes)

    return make


@pytest.fixture
def teacher(run_config, tmp_path):
    """The checkpoint of a run of one epoch."""
    return train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher")))


def flags_of(settings):
    """The command line of some settings."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


@pytest.fixture
def flags(small_data):
    return [*flags_of(SMALL_RUN), "--data-dir", str(small_data)]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script in this process, in an empty folder; returns its exit status or error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            module.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def main(script):
    before = signal.getsignal(signal.SIGTERM)
    yield partial(script, train)
    signal.signal(signal.SIGTERM, before)


def state_of(folder, name="last.pt"):
    """Everything that decides how a run goes on, without the times."""
    checkpoint = load_checkpoint(folder / name)[1]
    for row in checkpoint["history"]:
        del row["seconds"]
    del checkpoint["train_config"]["output_dir"]
    return checkpoint


def assert_identical(a, b):
    """Compare two checkpoints or parts of them, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert_identical(list(a.items()), list(b.items()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


def assert_alike(tmp_path):
    for name in ("last.pt", "best.pt"):
        assert_identical(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))
    files = [sorted(path.name for path in (tmp_path / n).glob("[!.]*")) for n in ("whole", "parts")]
    assert files[0] == files[1]
