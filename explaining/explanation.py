"""An image, the model's answer, and where the evidence for it lies."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
from common.files import printable
from dataset import CLASS_NAMES, IMAGE_SIZE
from gradcam import GradCAM
from model import PHOTOGRAPHS_CHECKPOINT, SHIPPED_CHECKPOINT, HybridClassifier, predict

DRAWS = 20  # of random pixels
# An answer of lower probability is unsure; chosen by benchmarks/photographs.py --held-out.
UNSURE = 0.7


def model_name(checkpoint: Path) -> str:
    """What a picture calls a model: "record", "photographs", or its file's folder and name."""
    names = {SHIPPED_CHECKPOINT: "record", PHOTOGRAPHS_CHECKPOINT: "photographs"}
    path = checkpoint.resolve()
    return names.get(path, printable("/".join(path.parts[-2:])))


def in_file_name(words: str) -> str:
    """Words, such as "T-shirt/top", without what file names may not have: "T-shirt-top"."""
    return re.sub(r"[^\w.-]", "-", words)


@dataclass
class Evidence:
    """Where the evidence for a class lies."""

    label: int  # the class
    versus: int  # the class that it is contrasted with, by a signed heatmap; -1 for none
    heatmap: np.ndarray  # float32 (28, 28): shares that add up to 1, or zeros
    # The probability of the class; without the hottest tenth of the garment; without a random
    # tenth: mean and standard deviation
    probabilities: tuple[float, ...] = (np.nan,) * 4

    def verdict(self) -> str:
        """Whether the hottest tenth matters more than a random one, by over a deviation."""
        _, hottest, random, deviation = self.probabilities
        if self.heatmap.any() and random - hottest > deviation:
            return "says something"
        return "says little"


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

    def role(self, evidence: Evidence) -> str:
        """What some of its evidence is for: "for Coat", or "for Coat, not Shirt"."""
        words = f"for {self.class_names[evidence.label]}"
        if not evidence.heatmap.any():
            words = f"no evidence\n{words}"
        if evidence.versus >= 0:
            words += f", not {self.class_names[evidence.versus]}"
        return words

    def caption(self, evidence: Evidence) -> str:
        """Its role, and what masking the hottest pixels does, against masking others."""
        role = self.role(evidence)
        if not evidence.heatmap.any():
            return role
        whole, hottest, random, deviation = evidence.probabilities
        words = f"{whole:.2f}; without its hottest tenth {hottest:.2f}"
        words += f", without a random tenth of the garment {random:.2f} ± {deviation:.2f}"
        return f"{role} ({evidence.verdict()}):\n{words}"

    def file_name(self) -> str:
        """The name of its picture: "01917_Coat_as_Coat_not_Shirt.png"."""
        asked = self.evidence[0]
        words = f"_as_{self.class_names[self.predicted]}"
        if asked.label != self.predicted:
            words += f"_for_{self.class_names[asked.label]}"
        if asked.versus >= 0:
            words += f"_not_{self.class_names[asked.versus]}"
        return f"{self.file_stem}{in_file_name(words)}.png"


def classify(model: HybridClassifier, images: Tensor) -> Tensor:
    """Class probabilities, float32 (N, 10), of uint8 images (N, 1, 28, 28)."""
    return predict(model, images, model.data).softmax(dim=1)


def mask_evidence(model: HybridClassifier, explanations: list[Explanation]) -> None:
    """Fill in the probabilities, also with a tenth of the garment, the pixels above 0, black.

    In a contrast, the hottest pixels speak most for the class.
    """
    draws = torch.rand(DRAWS, IMAGE_SIZE**2, generator=torch.Generator().manual_seed(0))
    for e in explanations:
        image = torch.from_numpy(e.image).flatten()
        maps = [torch.from_numpy(evidence.heatmap).flatten() for evidence in e.evidence]
        ranks = torch.stack([*maps, *draws]).masked_fill(image == 0, -torch.inf)
        count = max(1, round(image.count_nonzero().item() / 10))
        masked = image.repeat(len(ranks), 1).scatter(1, ranks.topk(count).indices, 0)
        found = classify(model, masked.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE))
        for evidence, hottest in zip(e.evidence, found, strict=False):
            k = evidence.label
            random = found[-DRAWS:, k]
            numbers = e.probabilities[k], hottest[k], random.mean(), random.std()
            evidence.probabilities = tuple(map(float, numbers))


def explain(
    cam: GradCAM,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | int | None = None,
    versus: int | str | None = None,
) -> list[Explanation]:
    """Explain uint8 images (N, 1, 28, 28) for the classes `targets`, else for the predicted ones.

    Labels, -1 where not known, and targets are int64 (N,). An image whose label differs from its
    target is explained for both. With `versus`, it is explained by a contrast with that class;
    for "next", and where that is the target, with the likeliest other class.
    """
    model = cam.model
    probabilities = classify(model, images)
    if targets is None:
        targets = probabilities.argmax(dim=1)
    targets = torch.as_tensor(targets).expand(len(images))
    rows = torch.arange(len(images))
    others = None
    if versus is None:
        wrong = ((labels >= 0) & (labels != targets)).nonzero().flatten()
        rows = torch.cat([rows, wrong])
        targets = torch.cat([targets, labels[wrong]])
    else:
        others = probabilities.scatter(1, targets[:, None], -1.0).argmax(dim=1)
        if versus != "next":
            others = torch.where(targets == versus, others, versus)
    x = dataset.normalize(images[rows], model.data)
    maps = cam(x, targets, others, normalize=False).numpy()
    explanations = []
    for image, label, p in zip(images, labels, probabilities, strict=True):
        e = Explanation(image[0].numpy(), int(label), p.numpy(), [])
        e.class_names = model.data.class_names
        explanations.append(e)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        other = -1 if others is None else int(others[i])
        explanations[row].evidence.append(Evidence(int(target), other, maps[i]))
    return explanations
