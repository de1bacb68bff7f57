"""This model against the field's usual small ones: the same images, recipe and epochs.

    python benchmarks/peers.py                                  train and test three of them
    python benchmarks/peers.py --train "ResNet-18" --epochs 33  only one, as long as the default

They take turns by the epoch, so that their seconds can be compared. The recipe is the default; only
this model has a first layer that whitens. "ResNet-20, cutout" has a recipe of its own, that of
https://github.com/hysts/pytorch_image_classification. The last weights are tested.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

import results
import robustness
import seeds
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

import train
from training.runs import Run

CUTOUT = "ResNet-20, cutout"
# Where its recipe differs from the default.
CUTOUT_RECIPE = dict(batch_size=128, lr=0.2, warmup_epochs=0.0, shift=4, erase=0.0, cutmix=0.0)
CUTOUT_RECIPE |= dict(ema_decay=0.0, grad_clip=0.0, skip_easy=0.0, alternate_flip=False)


# ---- The models ----


def classifier(layers: list[nn.Module], channels: int) -> nn.Module:
    """The layers, global average pooling and a linear head, initialised as by He et al. 2015."""
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module("head", nn.Linear(channels, 10))  # AdamW's, by this name
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(model.head.bias)
    return model


def resnet() -> nn.Module:
    """A ResNet-18 (He et al. 2015) for small images, with as many channels as 600k allow."""
    width = 16
    layers = [Conv2dNormActivation(1, width)]
    for channels, stride in ((16, 1), (32, 2), (64, 2), (112, 2)):
        shortcut = None
        if stride > 1:
            shortcut = Conv2dNormActivation(width, channels, 1, stride, activation_layer=None)
        layers.append(BasicBlock(width, channels, stride, shortcut))
        layers.append(BasicBlock(channels, channels))
        width = channels
    return classifier(layers, width)


def compact_transformer() -> nn.Module:
    """CCT-4/3x2 (Hassani et al. 2021, arXiv 2104.05704): this project's encoder, another stem.

    Theirs has stochastic depth and dropout of attention, 0.1 each, and its positions start ten
    times as large.
    """
    shape = dict(embed_dim=128, depth=4, num_heads=2, mlp_ratio=1.0)
    model = train.make_model(results.settings(**shape))
    layers = []
    for width, channels in ((1, 64), (64, 128)):
        layers.append(nn.Conv2d(width, channels, 3, padding=1, bias=False))
        nn.init.kaiming_normal_(layers[-1].weight)
        layers += [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    model.stem = nn.Sequential(*layers)
    return model


class PreactBlock(BasicBlock):
    """A pre-activation residual unit (He et al. 2016, arXiv 1603.05027).

    `is_first` activates the shortcut, too.
    """

    def __init__(self, width: int, channels: int, stride: int, is_first: bool) -> None:
        shortcut = nn.Identity()
        if width != channels:
            shortcut = nn.Conv2d(width, channels, 1, stride, bias=False)
        super().__init__(width, channels, stride, shortcut)
        self.bn1 = nn.BatchNorm2d(width)
        self.is_first = is_first

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = self.downsample(y if self.is_first else x)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


def preact_resnet() -> nn.Module:
    """The ResNet-20 of pre-activation units, 0.27M parameters."""
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False)]
    for width, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers.append(PreactBlock(width, channels, stride, is_first=True))
        layers += [PreactBlock(channels, channels, 1, is_first=False) for _ in range(2)]
    return classifier([*layers, nn.BatchNorm2d(64), nn.ReLU()], 64)


PEERS = {
    "this model": lambda: train.make_model(results.settings()),
    "ResNet-18": resnet,
    "CCT-4/3x2": compact_transformer,
    CUTOUT: preact_resnet,
}


def multiply_adds(model: nn.Module) -> float:
    """Multiply-adds of one image's forward pass; PyTorch counts two operations each."""
    with FlopCounterMode(display=False) as counter:
        train.predict(model, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    return counter.get_total_flops() / 2


# ---- Training ----


def start(name: str, **changes: object) -> Run:
    """A run of one of `PEERS`, with some settings of the default changed."""
    recipe = dict(whiten=name == "this model")
    if name == CUTOUT:
        recipe |= CUTOUT_RECIPE
    config = results.settings(**changes | recipe)
    torch.manual_seed(config.seed)
    run = train.start_run(config, model=PEERS[name]())
    if name == CUTOUT:
        options = dict(momentum=0.9, nesterov=True, weight_decay=1e-4)
        run.optimizers = [torch.optim.SGD(run.model.parameters(), lr=0.0, **options)]
        # Cutout (DeVries & Taylor 2017, arXiv 1708.04552) with 0, mean grey.
        cutout = partial(robustness.fill_square, side=16, outside=8)
        run.compiled = lambda x: run.model(cutout(x, run.generator))
    return run


def fit(runs: dict[str, Run], epochs: int) -> None:
    """Train the runs, an epoch of each in turn."""
    for epoch in range(epochs):
        for run in runs.values():
            started = time.perf_counter()
            row = train.train_epoch(run, epoch)
            run.history.append(dict(images=row["images"], seconds=time.perf_counter() - started))


def figures_of(run: Run, data_dir: str) -> results.Row:
    """The figures of a trained model."""
    model = run.ema.cpu()
    figures = seeds.figures_of(model, data_dir)
    if run.config.val_size:
        images, labels = run.originals[run.val_index], run.labels[run.val_index]
        right = train.predict(model, images.cpu()).argmax(dim=1) == labels.cpu()
        figures["val_accuracy"] = right.double().mean()
    seconds = statistics.median(row["seconds"] / row["images"] for row in run.history)
    figures["seconds_for_60000_images"] = round(60_000 * seconds, 1)
    figures["million_multiply_adds"] = round(multiply_adds(model) / 1e6, 1)
    return figures


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    names = ("epochs", "val_size", "seed", "data_dir")
    changes = {name: getattr(args, name) for name in names}
    runs = {name: start(name, **changes) for name in args.train}
    fit(runs, args.epochs)
    flags = f"--epochs {args.epochs} --val-size {args.val_size} --seed {args.seed}"
    for name, run in runs.items():
        command = f'python benchmarks/peers.py --train "{name}" {flags}'
        yield dict(name=name, command=command) | figures_of(run, args.data_dir)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--train", nargs="+", choices=PEERS, default=list(PEERS)[:3])
    add("--epochs", type=int, default=6)
    add("--val-size", type=int, default=5000)
    add("--seed", type=int, default=0)
    results.run(parser, measure, ("command",))


if __name__ == "__main__":
    main()
