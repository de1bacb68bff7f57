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
from explaining.explanation import Explanation
from explaining.features import (
    TrainingImages,
    distance,
    familiarity_note,
    feature_statistics,
    labels_of_nearest,
    load_training_images,
    measure,
    similar_images,
)
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


# ---- Similar training images ----


def of_pixels(*values):
    """Images that are black but for the first three pixels."""
    images = torch.zeros(len(values), 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, :3] = torch.tensor(values, dtype=torch.uint8)
    return images


def test_the_nearest_images_of_the_two_likeliest_classes_are_those_trained_on(monkeypatch):
    monkeypatch.setattr(dataset, "normalize", lambda images, data: images.float())
    # From (0, 0, 0) they are 5, 3, 13, 7, 15, 2 and 4 away; the last two were held out.
    images = [(3, 4, 0), (0, 0, 3), (5, 12, 0), (2, 3, 6), (9, 12, 0), (2, 0, 0), (4, 0, 0)]
    images, trained = of_pixels(*images), torch.arange(5)
    tokens = images[:5].flatten(1)[:, :3].half()

    def similar(labels, count):
        probabilities = np.array([0.3, 0.1, 0.6] + [0.0] * 7)
        e = Explanation(np.zeros((28, 28), np.uint8), -1, probabilities, [])
        held_out = torch.tensor([5, 6])
        training = TrainingImages(images, torch.tensor(labels), trained, held_out, tokens)
        return similar_images(Pixels(), e, training, count)

    likeliest, other = similar([2, 1, 0, 2, 2, 2, 0], 2)
    assert (likeliest.labels, other.labels) == (["5.00", "7.00"], ["13.00"])
    panels = [panel[0] for panel in likeliest.panels + other.panels]
    assert np.array_equal(panels, images[[0, 3, 2], 0])
    words = [cell.caption.splitlines()[1] for cell in (likeliest, other)]
    assert words == ["labelled Pullover", "labelled T-shirt/top"]
    assert (likeliest.color, other.color) == ("black", "black")
    likeliest, other = similar([2, 0, 0, 2, 2, 2, 0], 1)
    assert (likeliest.color, other.color, other.labels) == ("black", "crimson", ["3.00"])


def test_the_nearest_images_vote_on_a_label():
    known = of_pixels(*((i, 0, 0) for i in (1, 2, 3, 101, 102, 103))).flatten(1)[:, :3]
    labels = torch.tensor([4, 4, 6, 6, 5, 8, 8])  # the first was held out
    training = TrainingImages(None, labels, torch.arange(1, 7), torch.tensor([0]), known.half())
    tokens = torch.tensor([[0, 0, 0], [99, 0, 0], [2, 0, 1]]).float()
    assert labels_of_nearest(tokens, training).tolist() == [6, 8, 6]


def test_the_tokens_of_the_training_images_are_kept_for_these_images(
    small_checkpoint, small_model, small_data, monkeypatch
):
    def load():
        config = dict(val_size=100, train_size=160, seed=3)
        return load_training_images(small_checkpoint, small_model, config, small_data)

    images, labels = dataset.load(small_data, train=True)
    found = load()
    assert torch.equal(found.images, images) and torch.equal(found.labels, labels)
    expected = small_model.embed(dataset.normalize(images[found.trained])).detach()
    torch.testing.assert_close(found.tokens.float(), expected, rtol=1e-2, atol=1e-3)
    assert len(found.trained) == 160 and len(found.held_out) == 100
    assert not torch.isin(found.trained, found.held_out).any()
    monkeypatch.setattr(features, "embed", lambda model, images: torch.zeros(len(images), 1))
    assert torch.equal(load().tokens, found.tokens)  # read back
    monkeypatch.setattr(
        dataset, "load", lambda data_dir, train, read_image: (images.flip(3), labels)
    )
    assert not load().tokens.any()
