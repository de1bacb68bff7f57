"""This model against the field's usual small ones: the same images, augmentation, optimiser, schedule and epochs.

    python benchmarks/peers.py                      print the table of peers.csv
    python benchmarks/peers.py --train "ResNet-18"  train one of them, test its last averaged weights, save its line
    python benchmarks/peers.py --time               measure seconds an epoch, all in turn, with nothing else running

Training takes the default recipe of `train.py` for `--epochs`, with label smoothing instead of CutMix, which is
meant for long runs. The recipe's 5,000 validation images choose nothing here.
"ResNet-20, cutout" has a recipe of its own, that of https://github.com/hysts/pytorch_image_classification, whose last
epoch reaches 95.51 % (median of three runs of 200 epochs): SGD, crops with a border of 4 pixels, mirror images, and a
square of 16x16 pixels in mean grey. Theirs computes in float32, and ends at a thousandth of the learning rate.
With `--val-size 0` a model sees all 60,000 images, and its line goes to seeds.csv, beside this project's own.
`--state FILE` saves every epoch there, and goes on from it.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import robustness
import seeds
import step_time

import dataset
import train
from common.files import whole_file
from model import EncoderBlock, Pool
from training import optim, processes
from training.replay import ReplayedStep

TABLE = Path(__file__).resolve().parent / "peers.csv"


def resnet() -> nn.Module:
    """A ResNet-18 (He et al. 2015) for small images, of torchvision's blocks, with as many channels as 600k allow."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    in_channels = 16
    for channels, stride in ((16, 1), (32, 2), (64, 2), (112, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        layers += [BasicBlock(in_channels, channels, stride, shortcut), BasicBlock(channels, channels)]
        in_channels = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module("head", nn.Linear(in_channels, 10))  # by this name, `optim.make_optimizers` leaves it to AdamW
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class CompactConvolutionalTransformer(nn.Module):
    """CCT-4/3x2 (Hassani et al. 2021, arXiv 2104.05704), of this project's encoder blocks and attention pooling.

    Theirs has stochastic depth and dropout of attention, 0.1 each, and its positions start ten times as large.
    """

    def __init__(self, embed_dim: int = 128, depth: int = 4, num_heads: int = 2, mlp_ratio: float = 1.0) -> None:
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(64, embed_dim, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 49, embed_dim))
        self.blocks = nn.Sequential(
            *(EncoderBlock(embed_dim, num_heads, mlp_ratio, drop_path=0.0) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = Pool(embed_dim, "attention")
        self.head = nn.Linear(embed_dim, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.tokenizer(x.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        return self.head(self.pool(self.norm(self.blocks(tokens + self.pos_embed))))


class PreactBlock(nn.Module):
    """A pre-activation residual unit (He et al. 2016, arXiv 1603.05027); `is_first` activates the shortcut, too."""

    def __init__(self, in_channels: int, channels: int, stride: int, is_first: bool = False) -> None:
        super().__init__()
        self.is_first = is_first
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        is_changed = in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if is_changed else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        return self.shortcut(y if self.is_first else x) + self.conv2(F.relu(self.bn2(self.conv1(y))))


def preact_resnet() -> nn.Module:
    """The ResNet-20 of pre-activation units, 0.27M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False)]
    for in_channels, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [PreactBlock(in_channels, channels, stride, is_first=True)]
        layers += [PreactBlock(channels, channels, 1) for _ in range(2)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module("head", nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(model.head.bias)
    return model


def cutout(x: torch.Tensor, generator: torch.Generator, side: int = 16) -> torch.Tensor:
    """Set a square around a random place of each normalised image (N, 1, 28, 28) to 0, mean grey.

    DeVries & Taylor 2017, arXiv 1708.04552; a part of the square may lie outside the image.
    """
    center = torch.randint(0, dataset.IMAGE_SIZE + 1, (2, len(x), 1), generator=generator, device=x.device)
    near = (torch.arange(dataset.IMAGE_SIZE, device=x.device) - center + side // 2) // side == 0  # (2, N, 28)
    return x.masked_fill((near[0, :, :, None] & near[1, :, None, :])[:, None], 0.0)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "this model": lambda: step_time.build(step_time.settings_of("default")),
    "ResNet-18": resnet,
    "CCT-4/3x2": CompactConvolutionalTransformer,
    "ResNet-20, cutout": preact_resnet,
}
RECIPE = dict(cutmix=0.0, label_smoothing=0.1)  # of the others, where it differs from the default
OWN_RECIPE = dict(batch_size=128, lr=0.2, warmup_epochs=0.0, shift=4, erase=0.0, cutmix=0.0)  # of the last one
OWN_RECIPE |= dict(label_smoothing=0.0, ema_decay=0.0, grad_clip=0.0)


def fit(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: SimpleNamespace,
    name: str,
    optimizers: list[torch.optim.Optimizer] | None = None,
    state: Path | None = None,
) -> tuple[nn.Module, float]:
    """Train on all of the uint8 images (N, 1, 28, 28) as `train.train` does, or with other optimisers and cutout.

    Saves every epoch in the file `state`, and goes on from there. Returns the averaged model (with an
    `ema_decay` of 0, the last one), on the CPU, and seconds.
    """
    device = images.device
    model.to(device, memory_format=torch.channels_last).train()
    run = step_time.make_run(model, config, images, labels, optimizers)
    if optimizers:
        run.compiled = lambda x: model(cutout(x, run.generator))
    steps, first, started = len(images) // config.batch_size, 0, time.perf_counter()
    total_steps = config.epochs * steps
    warmup_steps = round(min(config.warmup_epochs, config.epochs / 4) * steps)
    step_once = partial(train.training_step, run)
    step_once = ReplayedStep(step_once, run.generator) if device.type == "cuda" else step_once
    parts = (model, run.ema, *run.optimizers)
    made_with = dict(name=name, **vars(config))
    if state and state.exists():
        saved = torch.load(state)
        if saved.get("made_with") != made_with:
            raise SystemExit(f"peers.py: error: {state} belongs to another command: name another file")
        for part, values in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(values)
        first, started = saved["epoch"], started - saved["seconds"]
    for epoch in range(first, config.epochs):
        run.generator.manual_seed(train.seed_for(config.seed, epoch))
        order = torch.randperm(len(images), generator=run.generator, device=device)[: steps * config.batch_size]
        batches = tqdm(order.split(config.batch_size), f"{name}, epoch {epoch + 1}", mininterval=60)
        for step, index in enumerate(batches, start=epoch * steps):
            lr = optim.learning_rate(step, total_steps, warmup_steps, config.lr, config.schedule)
            step_once(index, lr, min(config.ema_decay, optim.start_up_decay(step)))
        if state:
            with whole_file(state) as file:
                saved = dict(made_with=made_with, epoch=epoch + 1, seconds=time.perf_counter() - started)
                torch.save(saved | dict(parts=[part.state_dict() for part in parts]), file)
    return run.ema.cpu(), time.perf_counter() - started


def train_peer(args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Train the one of `PEERS` that the flags name; returns what `fit` does."""
    device = processes.choose_device("auto")
    settings = dict(epochs=args.epochs, seed=args.seed, val_size=args.val_size) | RECIPE
    torch.manual_seed(args.seed)
    model, optimizers = PEERS[args.train]().to(device), None
    if args.train == "ResNet-20, cutout":
        settings |= OWN_RECIPE
        options = dict(momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.0, **options)]
    config = step_time.settings_of("default", processes.choose_precision("auto", device), **settings)
    images, labels = dataset.load(args.data_dir, train=True)
    index = dataset.split_indices(labels, args.val_size, args.seed)[0]
    return fit(model, images[index].to(device), labels[index].to(device), config, args.train, optimizers, args.state)


def line_of(model: nn.Module, args: argparse.Namespace) -> dict[str, object]:
    """The line of a trained model in peers.csv."""
    images, labels = dataset.load(args.data_dir, train=True)
    index = dataset.split_indices(labels, args.val_size, args.seed)[1]
    right = train.predict(model, images[index]).argmax(dim=1) == labels[index]
    return dict(
        name=args.train,
        command=f'python benchmarks/peers.py --train "{args.train}" --epochs {args.epochs} '
        f"--val-size {args.val_size} --seed {args.seed}",
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        million_multiply_adds=round(step_time.multiply_adds(model) / 1e6, 1),
        seconds_for_60000_images="",
        val_accuracy=f"{right.double().mean().item():.2%}",
        **robustness.measure(model, *dataset.load(args.data_dir, train=False), seed=0),
    )


def command_for_seeds(args: argparse.Namespace) -> str:
    """The command, without the seed, that trains one of `PEERS` on all images."""
    return f'python benchmarks/peers.py --train "{args.train}" --epochs {args.epochs} --val-size 0'


def seeds_line(model: nn.Module, seconds: float, args: argparse.Namespace) -> dict[str, object]:
    """The line, in seeds.csv, of a model that was trained on all images."""
    device = processes.choose_device("auto")
    precision = processes.choose_precision("auto", device)
    return dict(
        command=command_for_seeds(args),
        seed=args.seed,
        val_accuracy=math.nan,
        minutes=round(seconds / 60, 1),
        environment=processes.environment(device.type, precision, torch.get_num_threads()),
        **seeds.figures_of(model, *dataset.load(args.data_dir, train=False)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=PEERS, help="train this one and save its line")
    parser.add_argument("--time", action="store_true", help="measure the seconds for 60,000 images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--val-size", type=int, default=5000)
    parser.add_argument("--state", type=Path, metavar="FILE", help="save every epoch here, and go on from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    if args.train or args.time:
        processes.set_threads()
    row = None
    if args.train:
        if not args.val_size:
            seeds.require_new(command_for_seeds(args), args.seed)
        model, seconds = train_peer(args)
        row = line_of(model, args) if args.val_size else None
        if not args.val_size:
            seeds.add_line(seeds_line(model, seconds, args))
    with open(TABLE, newline="") as file:  # after the training, since another one may have ended meanwhile
        rows: list[dict] = list(csv.DictReader(file))
    if row:
        rows = [*(other for other in rows if other["name"] != row["name"]), row]
    rows.sort(key=lambda row: list(PEERS).index(row["name"]))
    if args.time:
        config = step_time.settings_of("default", **RECIPE)
        names = [row["name"] for row in rows]
        steps = {n: (step_time.training_step(PEERS[n](), config), config.batch_size) for n in names}
        rates = step_time.images_per_second(steps, rounds=20)
        for row in rows:
            row["seconds_for_60000_images"] = round(60_000 / rates[row["name"]], 1)
    if args.train or args.time:
        seeds.save_table(rows, TABLE)
    print("| | " + " | ".join(row["name"] for row in rows) + " |\n|---|" + "---:|" * len(rows))
    for name in rows[0]:
        if name != "name":
            cells = [f"`{row[name]}`" if name == "command" else str(row[name]) for row in rows]
            print(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
