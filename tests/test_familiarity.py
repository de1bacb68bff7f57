import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf

import dataset
import train
from model import load_checkpoint
from training.familiarity import distance, embed, measure


class Pixels(nn.Module):
    """A model whose pooled tokens are the first three pixels."""

    def embed(self, x):
        return x.flatten(1)[:, :3]


@pytest.fixture
def measured():
    """Images whose first pixels lie around another place for each of two classes, and what was measured of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 2 * 7  # classes 0 and 7 alone
    images = torch.zeros(1000, 1, 28, 28)
    images[:, 0, 0, :3] = 60 + 10 * labels[:, None] + 12 * torch.randn(1000, 3, generator=generator)
    images[:, 0, 0, 1] += 0.5 * images[:, 0, 0, 0]
    images = images.round().byte()
    return images[:800], labels[:800], images[800:], measure(Pixels(), images[:800], labels[:800], images[800:])


def test_the_distance_is_mahalanobis_from_the_nearest_class(measured):
    images, labels, others, familiar = measured
    tokens = ((images.flatten(1)[:, :3] / 255 - 0.2860) / 0.3530).double().numpy()
    labels = labels.numpy()
    means = [tokens[labels == k].mean(axis=0) for k in (0, 7)]
    centred = tokens - np.array(means)[(labels == 7).astype(int)]
    precision = np.linalg.inv(ledoit_wolf(centred, assume_centered=True)[0])
    found = distance(embed(Pixels(), others), familiar["means"], familiar["precision"])
    for d, image in zip(found[:20], others, strict=False):
        token = (image.flatten()[:3].double().numpy() / 255 - 0.2860) / 0.3530
        assert d.item() == pytest.approx(min(mahalanobis(token, mean, precision) for mean in means) ** 2, rel=1e-3)


def test_three_in_two_hundred_are_strange_and_what_lies_far_off_is(measured):
    _, _, others, familiar = measured
    far = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    far[..., :3] = 255
    for x, share in ((others, 0.015), (far, 1.0)):
        found = distance(embed(Pixels(), x), familiar["means"], familiar["precision"])
        assert (found > familiar["limit"]).double().mean() == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("val_size", [100, 0])
def test_a_run_leaves_what_is_familiar_to_its_model_in_its_checkpoint(run_config, val_size):
    config = run_config(val_size=val_size, epochs=1)
    model, checkpoint = load_checkpoint(train.train(config))
    images, labels = dataset.load(config.data_dir, train=True)
    trained, held_out = dataset.split_indices(labels, val_size, config.seed)
    if config.train_size:
        trained = trained[dataset.split_indices(labels[trained], config.train_size, config.seed)[1]]
    known, others = (trained, held_out) if val_size else trained.chunk(2)
    expected = measure(model, images[known], labels[known], images[others])
    for name, value in expected.items():
        torch.testing.assert_close(checkpoint["familiar"][name], value, rtol=1e-3, atol=1e-5)
