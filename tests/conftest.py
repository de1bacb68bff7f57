"""What the tests share: the real data set and a small one, a small run, the scripts."""

import hashlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dataset
import train
from model import HybridClassifier, ModelConfig, load_checkpoint
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
    train_size=160, val_size=100, epochs=2, batch_size=16, drop_path=0.2
)
SMALL_RUN |= dict(device="cpu", precision="float32", threads=1, quiet=True, cutmix=0.0)
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="of the slow tests that draw some")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data set, which is found on the machine or fetched into it once."""
    for is_train in (True, False):
        dataset.load(ROOT / "data", is_train)
    return ROOT / "data"


@pytest.fixture(scope="session")
def test_split(data_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return dataset.load(data_dir, train=False)


def write_data(
    folder: Path, split: str, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, str]:
    """Write the files of a split ("train" or "t10k"); returns their names and SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"{split}-images-idx3-ubyte": struct.pack(">4i", 0x803, len(images), 28, 28)
        + images.numpy().tobytes(),
        f"{split}-labels-idx1-ubyte": struct.pack(">2i", 0x801, len(labels))
        + labels.byte().numpy().tobytes(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.fixture(scope="session")
def small_files(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    folder, hashes = tmp_path_factory.mktemp("small_data"), {}
    for split, size in (("train", 500), ("t10k", 100)):
        images, labels = dataset.load(data_dir, train=split == "train")
        hashes |= write_data(folder, split, images[:size], labels[:size])
    return folder, hashes


@pytest.fixture
def small_data(small_files: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the first 500 training and 100 test images; they are the whole data set for a
    test.
    """
    monkeypatch.setattr(dataset, "FILES", small_files[1])
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", small_files[0])
    monkeypatch.setattr(dataset.FashionMNIST, "mirrors", [])
    return small_files[0]


@pytest.fixture
def small_model() -> HybridClassifier:
    torch.manual_seed(0)
    return HybridClassifier(SMALL_MODEL).eval()


@pytest.fixture
def run_config(small_data: Path, tmp_path: Path):
    """Makes the configuration of a run of half a second; it saves in the folder "run"."""

    def make(**changes: object) -> SimpleNamespace:
        given = SMALL_RUN | dict(data_dir=str(small_data), output_dir=str(tmp_path / "run"))
        return choose_settings(train.SETTINGS, train.RECIPES, given | changes)

    return make


def flags_of(settings: dict[str, object]) -> list[str]:
    """The command line of some settings."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs train.py in this process, in an empty folder; returns the exit status or the line of an
    error.
    """
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> object:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        try:
            train.main()
        except SystemExit as end:
            return end.code
        return 0

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run_script(data_dir: Path, tmp_path: Path):
    """Runs one of the repository's scripts as a person would, in an empty folder."""

    def run(script: str, *flags: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        environment = dict(OMP_NUM_THREADS="1") | os.environ
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def state_of(folder: Path, name: str = "last.pt") -> dict:
    """Everything that decides how a run goes on, without the times."""
    checkpoint = load_checkpoint(folder / name)[1]
    for row in checkpoint["history"]:
        del row["seconds"]
    del checkpoint["train_config"]["output_dir"]
    return checkpoint


def assert_identical(a: object, b: object) -> None:
    """Compare two checkpoints or parts of them, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b
