"""Which training images are the most similar to an image."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import dataset
import train
from common.files import UserError

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
from explaining import features
from explaining.explanation import Explanation
from explaining.features import (
    TrainingImages,
    labels_of_nearest,
    load_training_images,
    similar_images,
)
from model import save_checkpoint


class Pixels(nn.Module):
    """A model whose pooled tokens are the first three pixels."""

    data = dataset.FASHION_MNIST

    def embed(self, x):
        return x.flatten(1)[:, :3]


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
    _, other = similar([2, 1, 1, 2, 2, 2, 0], 1)  # a class without images has none to show
    assert other.caption.endswith("labelled Trouser")


def test_the_nearest_images_vote_on_a_label():
    known = of_pixels(*((i, 0, 0) for i in (1, 2, 3, 101, 102, 103))).flatten(1)[:, :3]
    labels = torch.tensor([4, 4, 6, 6, 5, 8, 8])  # the first was held out
    training = TrainingImages(None, labels, torch.arange(1, 7), torch.tensor([0]), known.half())
    tokens = torch.tensor([[0, 0, 0], [99, 0, 0], [2, 0, 1]]).float()
    assert labels_of_nearest(tokens, training).tolist() == [6, 8, 6]


@pytest.mark.parametrize("val_size, train_size", [(100, 160), (0, 160), (0, 0)])
def test_the_images_are_those_that_training_used_and_held_out(
    run_config, small_model, small_data, tmp_path, val_size, train_size
):
    config = run_config(val_size=val_size, train_size=train_size, seed=3)
    _, _, train_index, val_index = train.load_data(config, torch.device("cpu"))
    save_checkpoint(tmp_path / "best.pt", small_model)
    load = partial(load_training_images, tmp_path / "best.pt", small_model, data_dir=small_data)
    found = load(vars(config) if train_size else {})
    assert torch.equal(found.trained, train_index) and torch.equal(found.held_out, val_index)
    with pytest.raises(UserError, match="give their --data-dir"):
        load(dict(val_size=5000))


def test_tokens_are_kept_for_this_checkpoint_and_these_images(
    small_model, small_data, tmp_path, monkeypatch
):
    path, kept = tmp_path / "best.pt", tmp_path / "best.similar.pt"
    save_checkpoint(path, small_model)

    def load():
        return load_training_images(path, small_model, dict(train_size=160), small_data)

    found = load()
    x = dataset.normalize(found.images[found.trained])
    assert found.tokens.shape == (160, 16)
    torch.testing.assert_close(found.tokens.float(), small_model.embed(x), rtol=1e-2, atol=1e-3)
    monkeypatch.setattr(features, "embed", lambda model, images: torch.zeros(len(images), 1))
    before = kept.read_bytes()
    assert load().tokens.any()  # read back
    for damaged in (before[:-100], b""):
        kept.write_bytes(damaged)
        assert not load().tokens.any()
    for foreign in (dict(a=1), [1]):
        torch.save(foreign, kept)
        assert not load().tokens.any()
    kept.write_bytes(before)
    save_checkpoint(path, small_model, history=[])
    assert not load().tokens.any()  # of another checkpoint
    save_checkpoint(path, small_model)
    kept.write_bytes(before)
    others = found.images.flip(3), found.labels
    monkeypatch.setattr(dataset, "load", lambda data_dir, train, read_image: others)
    assert not load().tokens.any()
    # Where nothing can be written, the answer is the same.
    kept.unlink()
    kept.mkdir()
    assert not load().tokens.any() and not list(kept.iterdir())
