"""How far an image is from the training images: the distance, the limit, and the file of both."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf

import dataset
import train
from common.files import UserError, checksum

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
from explaining import features
from explaining.features import distance, familiarity_note, feature_statistics, measure
from model import SHIPPED_CHECKPOINT, load_checkpoint, save_checkpoint


class Pixels(nn.Module):
    """A model whose pooled tokens are the first three pixels."""

    data = dataset.FASHION_MNIST

    def embed(self, x):
        return x.flatten(1)[:, :3]


def test_distance_and_limit_are_those_of_other_libraries_and_counts():
    # The first pixels lie around another place for each of two classes, 0 and 7.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 2 * 7
    images = torch.zeros(1000, 1, 28, 28)
    noise = torch.randn(1000, 3, generator=generator)
    images[:, 0, 0, :3] = 60 + 10 * labels[:, None] + 12 * noise
    images[:, 0, 0, 1] += 0.5 * images[:, 0, 0, 0]
    images = images.round().byte()
    images, others, labels = images[:800], images[800:], labels[:800]
    statistics = measure(Pixels(), images, labels, others)
    found = distance(Pixels(), others, statistics)
    tokens = ((images.flatten(1)[:, :3] / 255 - 0.2860) / 0.3530).double().numpy()
    is_seven = labels.numpy() == 7
    means = np.array([tokens[~is_seven].mean(axis=0), tokens[is_seven].mean(axis=0)])
    covariance = ledoit_wolf(tokens - means[is_seven.astype(int)], assume_centered=True)[0]
    precision = np.linalg.inv(covariance)
    for one, image in zip(found[:20], others, strict=False):
        token = (image.flatten()[:3].double().numpy() / 255 - 0.2860) / 0.3530
        nearest = min(mahalanobis(token, mean, precision) for mean in means)
        assert one.item() == pytest.approx(nearest**2, rel=1e-3)
    assert (found > statistics["limit"]).sum() == 3  # in two hundred of those that set it


@pytest.fixture
def small_checkpoint(small_model, tmp_path):
    save_checkpoint(tmp_path / "best.pt", small_model)
    return tmp_path / "best.pt"


@pytest.mark.parametrize("val_size, train_size", [(100, 160), (0, 160), (0, 0)])
def test_the_images_are_those_that_training_used_and_held_out(
    small_checkpoint, small_model, run_config, small_data, monkeypatch, val_size, train_size
):
    monkeypatch.setattr(features, "SAMPLE", 150)
    config = run_config(val_size=val_size, train_size=train_size, seed=3)
    images, labels, trained, held_out = train.load_data(config, torch.device("cpu"))
    known, others = trained, held_out["val"][0] if val_size else None
    if not val_size:
        known, others = trained[:300].chunk(2)
        others = images[others]
    expected = measure(small_model, images[known], labels[known], others)
    settings = vars(config) if train_size else {}
    found = feature_statistics(small_checkpoint, small_model, settings, small_data)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_statistics_are_kept_for_this_very_checkpoint(
    small_checkpoint, small_model, small_data, tmp_path, monkeypatch
):
    kept, measured = tmp_path / "best.features.pt", []

    def count(*given):
        measured.append(given)
        return dict(limit=torch.tensor(len(measured)))

    def limit():
        return feature_statistics(small_checkpoint, small_model, {}, small_data)["limit"]

    monkeypatch.setattr(features, "measure", count)
    assert [limit(), limit()] == [1, 1]  # read back
    assert torch.load(kept)["checkpoint"] == checksum(small_checkpoint)
    save_checkpoint(small_checkpoint, small_model, history=[])
    assert [limit(), limit()] == [2, 2]  # of another checkpoint
    kept.write_bytes(kept.read_bytes()[:-100])
    assert [limit(), limit()] == [3, 3]
    torch.save([], kept)
    assert limit() == 4
    # Where nothing can be written, the answer is the same.
    kept.unlink()
    kept.mkdir()
    assert [limit(), limit()] == [5, 6] and not list(kept.iterdir())


def test_other_images_than_the_models_are_refused(small_checkpoint, small_model, small_data):
    with pytest.raises(UserError, match="give their --data-dir"):
        feature_statistics(small_checkpoint, small_model, dict(val_size=5000), small_data)


def test_the_shipped_file_is_of_the_shipped_model(test_split, tmp_path):
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    # No data set is there: it is the file that is read.
    statistics = feature_statistics(SHIPPED_CHECKPOINT, model, {}, tmp_path)
    found = distance(model, test_split[0][:400], statistics)
    assert (found > statistics["limit"]).sum() == pytest.approx(8, abs=6)  # about 2 %


@pytest.mark.parametrize(
    "corners, words",
    [
        ((100, 10, 10, 10), ""),  # at the limit
        ((101, 72, 72, 72), "the model has never seen anything like it"),  # 0.52 of it
        ((101, 70, 90, 90), "rotated by 90 degrees to the left,"),  # 0.49
        ((101, 90, 70, 90), "rotated by 180 degrees,"),
        ((101, 90, 90, 70), "rotated by 90 degrees to the right,"),
        ((np.nan, 0, 0, 0), ""),  # after a run on a handful of images
    ],
)
def test_a_note_says_that_the_model_has_never_seen_the_like(monkeypatch, corners, words):
    # A model that sees the top left pixel alone, and is familiar with 0.
    image, model = torch.zeros(1, 28, 28), SimpleNamespace(data=None)
    model.embed = lambda x: x[:, 0, 0, :1]
    image[0, [0, 0, -1, -1], [0, -1, -1, 0]] = torch.tensor(corners, dtype=torch.float32)
    monkeypatch.setattr(dataset, "normalize", lambda x, data: x)
    statistics = dict(means=torch.zeros(1, 1), precision=torch.ones(1, 1), limit=100.0**2)
    note = familiarity_note(model, image, statistics)
    assert note.removesuffix(" it would look more familiar to the model") == words
