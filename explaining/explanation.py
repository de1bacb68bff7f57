"""An image, the model's answer, and where the evidence for it lies."""

from dataclasses import dataclass

import numpy as np
import torch

import dataset
from dataset import CLASS_NAMES, IMAGE_SIZE
from gradcam import GradCAM
from model import CheckpointError, HybridClassifier

FILE_NAMES = [name.replace("/", "-").replace(" ", "-") for name in CLASS_NAMES]


@dataclass
class Explanation:
    """An image, the model's answer, and where the evidence for a class lies."""

    name: str  # "test image 1917", or the file name of a person's own picture
    file_stem: str  # what the names of its files begin with
    index: int  # in the test split; -1 for a person's own picture
    image: np.ndarray  # uint8 (28, 28)
    label: int  # the true class; -1 where it is not known
    probabilities: np.ndarray  # of the classes, float (10,)
    target: int  # the class that was to be explained
    heatmaps: dict[int, np.ndarray]  # (28, 28), adding up to 1; see `explain` for which classes
    # Their probability without the map's hottest tenth, and without a random tenth
    masked_probability: dict[int, tuple[float, float]]
    versus: int = -1  # the class that `target` is contrasted with, by a signed map; -1 for none
    photograph: np.ndarray | None = None  # uint8 RGB (H, W, 3): what the image was made of

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    def answer(self) -> str:
        """What it is and what the model takes it for: "true Coat 3%, predicted Shirt 96%"."""
        words = f"predicted {CLASS_NAMES[self.predicted]} {self.probabilities.max():.0%}"
        if self.label < 0:
            return words
        true = f"true {CLASS_NAMES[self.label]}"
        if self.label != self.predicted:
            true += f" {self.probabilities[self.label]:.0%}"
        return f"{true}, {words}"

    def role(self, label: int) -> str:
        """What a class is to the image: "for Coat (true)"; in a contrast "for Shirt, not Coat"."""
        words = f"for {CLASS_NAMES[label]}"
        if self.versus >= 0:
            return f"{words}, not {CLASS_NAMES[self.versus]}"
        known = {"predicted": self.predicted, "true": self.label}
        roles = " and ".join(role for role in known if known[role] == label)
        return f"{words} ({roles})" if roles else words

    def masked_words(self, label: int) -> str:
        """What masking the map's hottest places does to the probability, against masking others."""
        if not self.heatmaps[label].any():
            return ""
        words = "{:.2f}, without the hottest tenth {:.2f}, without a random tenth {:.2f}"
        return words.format(self.probabilities[label], *self.masked_probability[label])

    def file_name(self) -> str:
        """The name of its picture, which says what was asked for besides the answer."""
        name = FILE_NAMES[self.predicted]
        if self.versus >= 0:
            name = f"{FILE_NAMES[self.target]}_not_{FILE_NAMES[self.versus]}"
        elif self.target != self.predicted:
            name += f"_for_{FILE_NAMES[self.target]}"
        return f"{self.file_stem}_as_{name}.png"


@torch.no_grad()
def classify(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities, float32 (N, 10), of uint8 images (N, 1, 28, 28); all are finite."""
    logits = [model(dataset.normalize(chunk)) for chunk in images.split(500)]
    probabilities = torch.cat(logits).softmax(dim=1)
    if not probabilities.isfinite().all():
        advice = "train again, or use another checkpoint"
        raise CheckpointError(f"the model's answer is not finite: {advice}")
    return probabilities


def heatmaps(
    cam: GradCAM, images: torch.Tensor, targets: torch.Tensor, versus: torch.Tensor | None = None
) -> np.ndarray:
    """Heatmaps, float32 (N, 28, 28), that add up to 1, for one class each, int64 (N,).

    Takes uint8 images (N, 1, 28, 28). With classes `versus`, int64 (N,), the maps are signed.
    """
    maps = []
    for index in torch.arange(len(images)).split(500):
        others = None if versus is None else versus[index]
        x = dataset.normalize(images[index])
        maps.append(cam(x, targets[index], others, normalize=False))
    return torch.cat(maps).numpy()


def masked_probabilities(
    model: HybridClassifier, images: torch.Tensor, targets: torch.Tensor, maps: np.ndarray
) -> list[tuple[float, float]]:
    """The classes' probabilities once the hottest tenth of the pixels is black, and a random tenth.

    Takes what `heatmaps` takes and makes. If the second is not well above the first, the map says
    little. The random tenth is the same for all images.
    """
    pixels = IMAGE_SIZE**2
    random = torch.rand(pixels, generator=torch.Generator().manual_seed(0)).expand(len(maps), -1)
    columns = []
    for heat in (torch.from_numpy(maps).flatten(1), random):
        masked = heat.topk(pixels // 10).indices
        variants = images.flatten(1).scatter(1, masked, 0).view_as(images)
        columns.append(classify(model, variants).gather(1, targets[:, None])[:, 0].tolist())
    return list(zip(*columns, strict=True))


def explain(
    cam: GradCAM,
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: list[int],
    targets: torch.Tensor | int | None = None,
    versus: int | None = None,
    with_masks: bool = True,
) -> list[Explanation]:
    """Explain uint8 images (N, 1, 28, 28) for the classes `targets`, else for the predicted ones.

    With a class `versus`, the map is of the contrast with it; with -1, or where that is the class
    itself, with each image's likeliest other class. Otherwise, an image whose label is known and
    differs from the target is explained for both.

    Takes labels, int64 (N,), and indices in the test split, both -1 where there is none, and
    targets, int64 (N,), or one for all. `masked_probabilities` are computed `with_masks`.
    """
    probabilities = classify(cam.model, images)
    targets = probabilities.argmax(dim=1) if targets is None else torch.as_tensor(targets)
    targets = targets.expand(len(images))
    others = None
    if versus is not None:
        others = probabilities.scatter(1, targets[:, None], -1.0).argmax(dim=1)
        if versus >= 0:
            others = torch.where(targets == versus, others, versus)
    maps = heatmaps(cam, images, targets, others)
    pairs = [(0.0, 0.0)] * len(images)
    if with_masks:
        pairs = masked_probabilities(cam.model, images, targets, maps)
    explanations = []
    for i, (target, label) in enumerate(zip(targets.tolist(), labels.tolist(), strict=True)):
        e = Explanation(
            name=f"test image {indices[i]}",
            file_stem=f"{indices[i]:05d}_{FILE_NAMES[label]}",
            index=indices[i],
            image=images[i, 0].numpy(),
            label=label,
            probabilities=probabilities[i].numpy(),
            target=target,
            heatmaps={target: maps[i]},
            masked_probability={target: pairs[i]},
            versus=-1 if others is None else int(others[i]),
        )
        explanations.append(e)
    wrong = ((labels >= 0) & (labels != targets)).nonzero().flatten().tolist()
    if versus is None and wrong:
        true = labels[wrong]
        also = explain(cam, images[wrong], true, wrong, true, with_masks=with_masks)
        for i, e in zip(wrong, also, strict=True):
            explanations[i].heatmaps |= e.heatmaps
            explanations[i].masked_probability |= e.masked_probability
    return explanations
