"""An image, the model's answer, and where the evidence for it lies."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

import dataset
from dataset import CLASS_NAMES, IMAGE_SIZE
from gradcam import GradCAM
from model import CheckpointError, HybridClassifier

SLUGS = [name.replace("/", "-").replace(" ", "-") for name in CLASS_NAMES]  # for file names


@dataclass
class Explanation:
    """An image, the model's answer, and where the evidence for a class lies."""

    name: str  # "test image 1917", or the file name of a person's own picture
    stem: str  # what its file's name begins with
    index: int  # in the test split; -1 for a person's own picture
    image: np.ndarray  # uint8 (28, 28)
    label: int  # the true class; -1 where it is not known
    probabilities: np.ndarray  # of the classes, float (10,)
    target: int  # the class that was to be explained
    heatmaps: dict[int, np.ndarray]  # of `target`, and of `label` where it is another: (28, 28), adding up to 1
    hidden: dict[int, tuple[float, float]]  # their probability without the map's hottest tenth, without a random one
    versus: int = -1  # the class that `target` is contrasted with, by a signed map; -1 for none
    photograph: np.ndarray | None = None  # uint8 RGB (H, W, 3): what a person's own image was made of

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    def answer(self) -> str:
        """What the image is and what the model takes it for: "true Coat 3%, predicted Shirt 96%"."""
        p, words = self.probabilities, f"predicted {CLASS_NAMES[self.predicted]} {self.probabilities.max():.0%}"
        if self.label < 0:
            return words
        percent = "" if self.label == self.predicted else f" {p[self.label]:.0%}"
        return f"true {CLASS_NAMES[self.label]}{percent}, {words}"

    def role(self, label: int) -> str:
        """A class's name, and what it is to this image: "for Coat (true)"; or the contrast: "for Shirt, not Coat"."""
        if self.versus >= 0:
            return f"for {CLASS_NAMES[label]}, not {CLASS_NAMES[self.versus]}"
        roles = ["predicted"] * (label == self.predicted) + ["true"] * (label == self.label)
        return f"for {CLASS_NAMES[label]}" + (f" ({' and '.join(roles)})" if roles else "")

    def trust(self, label: int) -> str:
        """What hiding the map's hottest places does to the probability, against hiding others."""
        if not self.heatmaps[label].any():
            return ""
        without = "{:.2f}, without the hottest tenth {:.2f}, without a random tenth {:.2f}"
        return without.format(self.probabilities[label], *self.hidden[label])


@torch.no_grad()
def classify(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities, float32 (N, 10), of uint8 images (N, 1, 28, 28); a CheckpointError if they are none."""
    probabilities = torch.cat([model(dataset.normalize(chunk)).softmax(dim=1) for chunk in images.split(500)])
    if not probabilities.isfinite().all():
        raise CheckpointError("the model's answer is not finite: train again, or use another checkpoint")
    return probabilities


def heatmaps(
    cam: GradCAM, images: torch.Tensor, targets: torch.Tensor, versus: torch.Tensor | None = None
) -> np.ndarray:
    """Heatmaps, float32 (N, 28, 28), that add up to 1, of uint8 images (N, 1, 28, 28) for one class each, (N,).

    With classes `versus`, (N,), to contrast them with, the maps are signed.
    """
    contrasts = itertools.repeat(None) if versus is None else versus.split(500)
    chunks = zip(images.split(500), targets.split(500), contrasts, strict=False)
    return torch.cat([cam(dataset.normalize(x), target, other, normalize=False) for x, target, other in chunks]).numpy()


def without_a_tenth(
    model: HybridClassifier, images: torch.Tensor, targets: torch.Tensor, maps: np.ndarray
) -> list[tuple[float, float]]:
    """The classes' probabilities once the hottest tenth of the pixels is black, and once a random tenth is.

    Takes what `heatmaps` takes and makes. The random tenth is the same for all images. If the second probability is not
    well above the first, the map says little.
    """
    hottest = torch.from_numpy(maps).flatten(1)
    anywhere = torch.rand(IMAGE_SIZE**2, generator=torch.Generator().manual_seed(0)).expand_as(hottest)
    hidden = torch.stack([hottest, anywhere], dim=1).topk(IMAGE_SIZE**2 // 10).indices  # (N, 2, 78)
    variants = images.view(-1, 1, IMAGE_SIZE**2).repeat(1, 2, 1).scatter(2, hidden, 0)
    probabilities = classify(model, variants.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)).view(len(images), 2, -1)
    return list(map(tuple, probabilities.gather(2, targets.view(-1, 1, 1).expand(-1, 2, 1))[..., 0].tolist()))


def explain(
    cam: GradCAM,
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: list[int],
    targets: torch.Tensor | int | None = None,
    versus: int | None = None,
    with_trust: bool = True,
) -> list[Explanation]:
    """Explain uint8 images (N, 1, 28, 28) for the classes `targets`, int64 (N,) or one for all, or else the predicted.

    With a class `versus`, the map is of the contrast with it; with -1, or where that is the class itself, with each
    image's likeliest other class. Otherwise, an image whose label, int64 (N,), is known (not -1) and differs from
    the target is explained for both. `indices` are the images' numbers in the test split, -1 for a person's own. Only
    `with_trust` are the numbers of `without_a_tenth` computed.
    """
    probabilities = classify(cam.model, images)
    targets = probabilities.argmax(dim=1) if targets is None else torch.as_tensor(targets).expand(len(images))
    parts, contrasts = [(torch.arange(len(images)), targets)], None
    wrong = ((labels >= 0) & (labels != targets)).nonzero().flatten()
    if versus is None and len(wrong):
        parts.append((wrong, labels[wrong]))
    elif versus is not None:
        others = probabilities.scatter(1, targets[:, None], -1.0).argmax(dim=1)
        contrasts = others if versus < 0 else torch.where(targets == versus, others, versus)
    columns = indices, images[:, 0].numpy(), labels.tolist(), probabilities.numpy(), targets.tolist()
    against = [-1] * len(images) if contrasts is None else contrasts.tolist()
    explanations = [
        Explanation(f"test image {i}", f"{i:05d}_{SLUGS[label]}", i, image, label, p, target, {}, {}, other)
        for i, image, label, p, target, other in zip(*columns, against, strict=True)
    ]
    for index, classes in parts:
        maps = heatmaps(cam, images[index], classes, contrasts)
        hidden = [(0.0, 0.0)] * len(index)
        if with_trust:
            hidden = without_a_tenth(cam.model, images[index], classes, maps)
        for i, label, heatmap, pair in zip(index.tolist(), classes.tolist(), maps, hidden, strict=True):
            explanations[i].heatmaps[label], explanations[i].hidden[label] = heatmap, pair
    return explanations
