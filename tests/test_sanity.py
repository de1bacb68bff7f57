"""The sanity checks of Adebayo et al. 2018 (arXiv 1810.03292): a map that stays the same explains nothing.

Maps are compared by their rank correlation over the garment; what the shipped model's are is in benchmarks/README.md.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_MODEL

import dataset
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint

try:
    from sanity import randomized_from_the_top, rank_correlation
except SystemExit as missing:  # OpenCV without libGL.so.1: the message says what to install
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED_CHECKPOINT)[0]


def test_the_cascade_leaves_no_weight_as_it_was_and_follows_the_model_from_its_end(shipped):
    before, names, untouched = shipped.state_dict(), [], {}
    for name, changed in randomized_from_the_top(shipped):
        names.append(name)
        untouched[name] = {key for key, weight in changed.state_dict().items() if torch.equal(weight, before[key])}
    assert names[:5] == ["head", "pool", "norm", "blocks.0", "pos_embed"] and names[-1] == "stem.first"
    assert "pos_embed" in untouched["blocks.0"] and "stem.stage2_0.conv1.0.weight" in untouched["pos_embed"]
    assert untouched["pos_embed"] == {key for key in before if key.startswith("stem.")}
    assert not untouched["stem.first"]


# Not Grad-CAM++: with another head its maps stay as they were (0.96). benchmarks/README.md says so.
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"gradcam++"}))
def test_maps_change_when_weights_are_randomised_from_the_top_down(shipped, test_split, method):
    images = test_split[0][:20]
    x, layers = dataset.normalize(images), shipped.stage_ends()[:2]
    cam = GradCAM(shipped, layers, method)
    maps = cam(x)
    classes = cam.logits.argmax(dim=1)
    similarity = {}
    for part, changed in randomized_from_the_top(shipped):
        if part in ("head", "blocks.0", "stem.first"):
            similarity[part] = rank_correlation(maps, GradCAM(changed, layers, method)(x, classes), images)
    assert similarity["head"] < 0.8  # the last layer alone
    assert similarity["blocks.0"] < 0.6
    assert abs(similarity["stem.first"]) < 0.25  # everything


def test_maps_of_one_image_differ_between_classes(shipped, test_split):
    images = test_split[0][:20]
    x = dataset.normalize(images)
    with GradCAM(shipped, shipped.stage_ends()[:2], "layercam") as cam:
        maps = cam(x)
        ranking = cam.logits.argsort(dim=1, descending=True)
        for rank in (1, 2, 9):
            assert rank_correlation(maps, cam(x, ranking[:, rank]), images) < 0.6
        again = cam(x, ranking[:, 0])
    assert rank_correlation(maps, again, images) == pytest.approx(1)


def memorize(images: torch.Tensor, labels: torch.Tensor) -> HybridClassifier:
    """A small model that has learnt these labels by heart, whatever they are."""
    torch.manual_seed(0)
    model = HybridClassifier(dataclasses.replace(SMALL_MODEL, embed_dim=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x = dataset.normalize(images)
    for _ in range(50):
        loss = F.cross_entropy(model.train()(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x).argmax(dim=1) == labels).float().mean() > 0.95
    return model


def test_maps_change_when_labels_are_randomised(test_split):
    images, labels = (part[:40] for part in test_split)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    # The same images, first weights, and steps: only the labels differ.
    models = [(memorize(images, targets), targets) for targets in (labels, shuffled)]
    for method in ("gradcam", "layercam"):
        true, other = (
            GradCAM(model, model.stage_ends()[:2], method)(dataset.normalize(images), targets)
            for model, targets in models
        )
        assert rank_correlation(true, other, images) < 0.5, method
