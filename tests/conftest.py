"""What the tests share: the real data set, a small run's configuration, and the repository's scripts as processes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dataset
import train
from model import HybridClassifier, ModelConfig
from training.processes import set_threads

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # some tests use its cases; at the end: it has a gradcam.py of its own
set_threads()
SMALL_MODEL = ModelConfig(
    stem_dims=(4, 8),
    stem_blocks=(0, 1, 1),
    embed_dim=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2.0,
    pool="attention",
    drop_path=0.0,
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data set, fetched once into the repository's data folder."""
    dataset.prepare(ROOT / "data")
    return ROOT / "data"


@pytest.fixture(scope="session")
def test_split(data_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return dataset.load(data_dir, train=False)


@pytest.fixture
def small_model() -> HybridClassifier:
    torch.manual_seed(0)
    return HybridClassifier(SMALL_MODEL).eval()


@pytest.fixture
def run_config(data_dir: Path, tmp_path: Path):
    """Makes the configuration of a run of seconds: a small model, 640 real images, two epochs."""

    def make(**changes: object) -> SimpleNamespace:
        settings = (
            train.choose_settings({})
            | vars(SMALL_MODEL)
            | dict(data_dir=str(data_dir), device="cpu", output_dir=str(tmp_path / "run"), quiet=True)
        )
        settings |= dict(train_size=640, val_size=500, epochs=2, batch_size=64, drop_path=0.2)
        return SimpleNamespace(**settings | changes)

    return make


@pytest.fixture
def run_script(data_dir: Path, tmp_path: Path):
    """Runs one of the repository's scripts as a person would, in an empty folder."""

    def run(script: str, *flags: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
