"""The sanity checks of Adebayo et al. 2018 (arXiv 1810.03292), on the shipped model."""

import pytest
import torch

from gradcam import METHODS

sanity = pytest.importorskip("sanity", reason="OpenCV cannot be loaded", exc_type=SystemExit)


def test_the_cascade_leaves_no_weight_and_begins_at_the_end(shipped):
    names = []
    for name, model in sanity.randomized_from_the_top(shipped):
        names.append(name)
        weights = model.state_dict()
    assert names[0] == "head" and names[-1] == "stem.first"
    assert not any(torch.equal(weights[n], old) for n, old in shipped.state_dict().items())


def test_maps_change_with_the_class_and_with_the_weights(shipped, test_split):
    layers = ("stem.stage0_0", "stem.down1")
    candidates = [sanity.Candidate(method, True, layers) for method in METHODS]
    rows = list(sanity.correlations(shipped, test_split[0][:20], candidates))
    assert len(rows) == 5
    for method, candidate in zip(METHODS, candidates, strict=True):
        highest = max(row[str(candidate)] for row in rows)
        # With another head, those of Grad-CAM++ stay (0.66).
        assert (highest < 0.25) == (method != "gradcam++")
