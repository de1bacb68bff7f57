"""An image, the model's answer, and where the evidence for it lies."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import dataset
from common.files import printable
from dataset import CLASS_NAMES, IMAGE_SIZE
from gradcam import GradCAM
from model import PHOTOGRAPHS_CHECKPOINT, SHIPPED_CHECKPOINT, HybridClassifier

DRAWS = 20  # of random pixels
# An answer of a lower probability is unsure; chosen by benchmarks/photographs.py --archive.
UNSURE = 0.7


def model_name(checkpoint: Path) -> str:
    """What a picture calls a model: "record", "photographs", or its file's folder and name."""
    names = {SHIPPED_CHECKPOINT: "record", PHOTOGRAPHS_CHECKPOINT: "photographs"}
    path = checkpoint.resolve()
    return names.get(path, printable("/".join(path.parts[-2:])))


def in_file_name(class_name: str) -> str:
    """A class's name without what file names may not have: "T-shirt-top"."""
    return re.sub(r"[^\w.-]", "-", class_name)


@dataclass
class Evidence:
    """Where the evidence for a class lies."""

    label: int  # the class
    versus: int  # the class that it is contrasted with, by a signed heatmap; -1 for none
    heatmap: np.ndarray  # float32 (28, 28): shares that add up to 1, or zeros
    # The probability of the class; without the hottest tenth of the garment; without a random
    # tenth: mean and standard deviation
    probabilities: tuple[float, ...] = (np.nan,) * 4
    class_names: tuple[str, ...] = CLASS_NAMES

    def verdict(self) -> str:
        """Whether the hottest tenth matters more than a random one, by over a deviation."""
        _, hottest, random, deviation = self.probabilities
        if self.heatmap.any() and random - hottest > deviation:
            return "says something"
        return "says little"

    def role(self) -> str:
        """Like "for Coat" or "for Coat, not Shirt"."""
        words = f"for {self.class_names[self.label]}"
        if not self.heatmap.any():
            words = f"no evidence\n{words}"
        if self.versus >= 0:
            words += f", not {self.class_names[self.versus]}"
        return words

    def caption(self) -> str:
        """What it is for, and what masking the hottest pixels does, against masking others."""
        if not self.heatmap.any():
            return self.role()
        whole, hottest, random, deviation = self.probabilities
        words = f"{whole:.2f}; without its hottest tenth {hottest:.2f}"
        words += f", without a random tenth of the garment {random:.2f} ± {deviation:.2f}"
        return f"{self.role()} ({self.verdict()}):\n{words}"


@dataclass
class Explanation:
    """An image, and how the model sees it."""

    image: np.ndarray  # uint8 (28, 28)
    label: int  # the true class; -1 where it is not known
    probabilities: np.ndarray  # of classes, float32 (10,)
    evidence: list[Evidence]  # for the class that was asked for; then for the true one, if another
    name: str = ""  # "test image 1917", or a picture's file name
    file_stem: str = ""  # what the names of its files begin with
    index: int = -1  # in its split; -1 for a person's own picture
    photograph: np.ndarray | None = None  # uint8 RGB (400, 400, 3): what the image was made of
    similar: list | tuple = ()  # cells of a sheet: similar training images
    class_names: tuple[str, ...] = CLASS_NAMES

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    def share(self, label: int) -> str:
        """A class and its probability: "Shirt 96%"."""
        share = min(self.probabilities[label], 0.99)  # never rounded up to 100%
        return f"{self.class_names[label]} {share:.0%}"

    def answer(self) -> str:
        """What it is and what the model takes it for: "true Coat 3%, predicted Shirt 96%".

        Where that is not known: "Shirt 96%", or "unsure: Shirt 48%, Coat 30%".
        """
        predicted = self.share(self.predicted)
        if self.label == self.predicted:
            return f"true {self.class_names[self.label]}, predicted {predicted}"
        if self.label >= 0:
            return f"true {self.share(self.label)}, predicted {predicted}"
        if self.probabilities.max() < UNSURE:
            second = self.probabilities.argsort()[-2]
            return f"unsure: {predicted}, {self.share(second)}"
        return predicted

    def file_name(self) -> str:
        """The name of its picture: "01917_Coat_as_Coat_not_Shirt.png"."""
        asked = self.evidence[0]
        names = [in_file_name(name) for name in self.class_names]
        name = f"{self.file_stem}_as_{names[self.predicted]}"
        if asked.label != self.predicted:
            name += f"_for_{names[asked.label]}"
        if asked.versus >= 0:
            name += f"_not_{names[asked.versus]}"
        return f"{name}.png"


@torch.no_grad()
def classify(model: HybridClassifier, images: Tensor) -> Tensor:
    """Class probabilities, float32 (N, 10), of uint8 images (N, 1, 28, 28)."""
    logits = [model(dataset.normalize(chunk, model.data)) for chunk in images.split(500)]
    return torch.cat(logits).softmax(dim=1)


def mask_evidence(model: HybridClassifier, explanations: list[Explanation]) -> None:
    """Fill in the probabilities, also with a tenth of the garment, the pixels above 0, black.

    In a contrast, the hottest pixels speak most for the class.
    """
    draws = torch.rand(DRAWS, IMAGE_SIZE**2, generator=torch.Generator().manual_seed(0))
    variants = []
    for e in explanations:
        image = torch.from_numpy(e.image).flatten()
        maps = [torch.from_numpy(evidence.heatmap).flatten() for evidence in e.evidence]
        ranks = torch.stack([*maps, *draws]).masked_fill(image == 0, -torch.inf)
        count = max(1, round(image.count_nonzero().item() / 10))
        variants.append(image.repeat(len(ranks), 1).scatter(1, ranks.topk(count).indices, 0))
    images = torch.cat(variants).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    probabilities = classify(model, images).split([len(rows) for rows in variants])
    for e, masked in zip(explanations, probabilities, strict=True):
        for i, evidence in enumerate(e.evidence):
            found = masked[:, evidence.label]
            random = found[len(e.evidence) :]
            numbers = e.probabilities[evidence.label], found[i], random.mean(), random.std()
            evidence.probabilities = tuple(map(float, numbers))


def explain(
    cam: GradCAM,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | int | None = None,
    versus: int | Literal["next"] | None = None,
) -> list[Explanation]:
    """Explain uint8 images (N, 1, 28, 28) for the classes `targets`, else for the predicted ones.

    Labels, -1 where not known, and targets are int64 (N,). An image whose label differs from its
    target is explained for both. With `versus`, it is explained by a contrast with that class;
    for "next", and where that is the target, with the likeliest other class.
    """
    probabilities = classify(cam.model, images)
    targets = probabilities.argmax(dim=1) if targets is None else torch.as_tensor(targets)
    targets = targets.expand(len(images))
    others = None
    if versus is not None:
        others = probabilities.scatter(1, targets[:, None], -1.0).argmax(dim=1)
        if versus != "next":
            others = torch.where(targets == versus, others, versus)
    data = cam.model.data
    x = dataset.normalize(images, data)
    maps = cam(x, targets, others, normalize=False).numpy()
    explanations = []
    for i, target in enumerate(targets.tolist()):
        other = -1 if others is None else int(others[i])
        evidence = [Evidence(target, other, maps[i], class_names=data.class_names)]
        e = Explanation(images[i, 0].numpy(), int(labels[i]), probabilities[i].numpy(), evidence)
        e.class_names = data.class_names
        explanations.append(e)
    if versus is None:
        wrong = ((labels >= 0) & (labels != targets)).nonzero().flatten()
        also = cam(x[wrong], labels[wrong], normalize=False).numpy()
        for i, heatmap in zip(wrong.tolist(), also, strict=True):
            e = explanations[i]
            e.evidence.append(Evidence(e.label, -1, heatmap, class_names=e.class_names))
    return explanations
