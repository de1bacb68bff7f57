"""Which layer's heatmaps find what the decision rests on: deletion and insertion for each candidate layer.

    python benchmarks/target_layer.py

Deletion blackens the image from its hottest places on, insertion shows them first on a black image, in 20 equal shares
of the pixels; the figure is the mean probability of the predicted class over the shares (Petsiuk et al. 2018, "RISE",
arXiv 1806.07421). A faithful heatmap has a low deletion and a high insertion figure. Images are from the validation
split, since a default is chosen by them, so the model must be one that held them out, as the shipped one did.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import train
from gradcam import GradCAM
from model import HybridClassifier, load_checkpoint

SHARES = 20


def mean_probability(model: HybridClassifier, images: torch.Tensor, maps: torch.Tensor, insert: bool) -> float:
    """Mean probability of the class predicted for the whole image while pixels go, or come, hottest first."""
    classes = train.predict(model, images).argmax(dim=1, keepdim=True)
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(images)
    total = 0.0
    for share in range(SHARES + 1):
        hot = rank < share / SHARES * rank[0].numel()
        logits = train.predict(model, images * (hot if insert else ~hot))
        total += logits.softmax(dim=1).gather(1, classes).mean().item()
    return total / (SHARES + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="checkpoints/shipped/model.pt")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--num-images", type=int, default=1000)
    args = parser.parse_args()
    model, checkpoint = load_checkpoint(args.checkpoint)
    config = checkpoint["train_config"]
    images, labels = dataset.load(args.data_dir, train=True)
    val = dataset.split_indices(labels, config["val_size"], config["seed"])[1]
    if not len(val):
        raise SystemExit(f"target_layer.py: error: {args.checkpoint} was trained on all images: name one that was not")
    images = images[val[:: max(1, len(val) // args.num_images)]]
    generator = torch.Generator().manual_seed(0)
    maps = {"random places": torch.rand(len(images), 28, 28, generator=generator), "brightness": images[:, 0].float()}
    layers = [f"stem.{name}" for name, _ in model.stem.named_children()]
    for layer in [*layers, *(f"blocks.{i}" for i in range(len(model.blocks)))]:
        maps[layer] = torch.cat([GradCAM(model, layer)(dataset.normalize(chunk)) for chunk in images.split(250)])
    print(f"{len(images)} validation images, {args.checkpoint}\n")
    print("| heatmap | deletion (low is good) | insertion (high is good) | maps without evidence |")
    print("|---|---:|---:|---:|")
    for name, layer_maps in maps.items():
        deletion, insertion = (mean_probability(model, images, layer_maps, insert) for insert in (False, True))
        empty = (layer_maps.flatten(1).amax(dim=1) == 0).double().mean().item()
        print(f"| {name} | {deletion:.3f} | {insertion:.3f} | {empty:.1%} |", flush=True)


if __name__ == "__main__":
    main()
