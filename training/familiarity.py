"""How far an image is from everything that a model was trained on (after Lee et al. 2018, arXiv
1807.03888).

They combine several layers and perturb the image first; here it is the last layer, and the image as
it is.
"""

import torch
from sklearn.covariance import LedoitWolf

import dataset
from model import HybridClassifier

SAMPLE = 2000  # images from which the statistics are computed: enough for a covariance, and quick
# share of the limit-setting images that lie beyond the limit; of new ones, about 2 %
FLAGGED = 0.015


@torch.no_grad()
def embed(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """The pooled tokens, float32 (N, C), of uint8 images (N, 1, 28, 28)."""
    return torch.cat([model.embed(dataset.normalize(chunk)) for chunk in images.split(100)]).cpu()


def distance(tokens: torch.Tensor, means: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    """The squared Mahalanobis distance (N,) of pooled tokens (N, C) from the nearest class, of
    means (K, C).
    """
    from_means = tokens[:, None] - means
    return torch.einsum("nkc,cd,nkd->nk", from_means, precision, from_means).amin(dim=1)


def measure(
    model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The classes' means (K, C), their common precision (C, C), and the distance beyond which an
    image is strange.

    Takes uint8 training images (N, 1, 28, 28) with their labels, int64 (N,), and others that set
    the limit: images that were held out or, where none were, further training images.
    """
    tokens, labels = embed(model, images[:SAMPLE]), labels[:SAMPLE].cpu()
    means = torch.stack([tokens[labels == k].mean(dim=0) for k in labels.unique()])
    centred = tokens - means[labels.unique(return_inverse=True)[1]]
    precision = torch.from_numpy(
        LedoitWolf(assume_centered=True).fit(centred.numpy()).precision_
    ).float()
    limit = distance(embed(model, held_out[:SAMPLE]), means, precision).quantile(1 - FLAGGED)
    return dict(means=means, precision=precision, limit=limit)
