"""The sanity checks of Adebayo et al. 2018 (arXiv 1810.03292), on the shipped model."""

import pytest
import torch

import dataset
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, load_checkpoint

sanity = pytest.importorskip("sanity", reason="OpenCV cannot be loaded", exc_type=SystemExit)


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED_CHECKPOINT)[0]


def test_the_cascade_leaves_no_weight_and_begins_at_the_end(shipped):
    names = []
    for name, model in sanity.randomized_from_the_top(shipped):
        names.append(name)
        weights = model.state_dict()
    assert names[:5] == ["head", "pool", "norm", "blocks.0", "pos_embed"]
    assert names[-1] == "stem.first"
    assert not any(torch.equal(weights[n], old) for n, old in shipped.state_dict().items())


# Not Grad-CAM++: with another head its maps stay (0.96).
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"gradcam++"}))
def test_maps_change_when_weights_are_randomised_from_the_top_down(shipped, test_split, method):
    images = test_split[0][:20]
    x, layers = dataset.normalize(images), shipped.stage_ends()[:2]
    cam = GradCAM(shipped, layers, method)
    maps = cam(x)
    most = {"head": 0.8, "blocks.0": 0.6, "stem.first": 0.25}
    for part, changed in sanity.randomized_from_the_top(shipped):
        if part in most:
            others = GradCAM(changed, layers, method)(x, cam.logits.argmax(dim=1))
            assert sanity.rank_correlation(maps, others, images).mean() < most[part]


def test_maps_of_one_image_differ_between_classes(shipped, test_split):
    images = test_split[0][:20]
    x = dataset.normalize(images)
    cam = GradCAM(shipped, ["stem.stage0_0", "stem.down1"], "hirescam", log_odds=True)
    maps = cam(x)
    ranking = cam.logits.argsort(dim=1, descending=True)
    assert torch.equal(maps, cam(x, ranking[:, 0]))
    for rank in (1, 2, 9):
        others = cam(x, ranking[:, rank])
        assert sanity.rank_correlation(maps, others, images).mean() < 0
