"""This model against the field's usual small ones: the same images, augmentation, optimiser,
schedule and epochs.

    python benchmarks/peers.py                      train and test three of them
    python benchmarks/peers.py --train "ResNet-18"  only one of them

They take turns by the epoch, so that their seconds can be compared. Training takes the default
recipe of `train.py`, with label smoothing instead of CutMix, which is meant for long runs. The last
averaged weights are tested; the recipe's 5,000 validation images choose nothing here. "ResNet-20,
cutout" has a recipe of its own, that of https://github.com/hysts/pytorch_image_classification,
whose last epoch reaches 95.51 % (median of three runs of 200 epochs): SGD, crops with a border of 4
pixels, flips, and a square of 16x16 pixels in mean grey. Theirs computes in float32, and ends at a
thousandth of the learning rate. With `--val-size 0` a model sees all 60,000 images, and its row
goes to seeds.csv, beside this project's own. `--state FOLDER` saves every epoch there, and goes on
from it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results
import robustness
import seeds
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

import dataset
import train
from common.files import whole_file
from model import EncoderBlock, Pool
from training import processes
from training.runs import Run

RECIPE = dict(cutmix=0.0, label_smoothing=0.1)  # where it differs from the default
CUTOUT = "ResNet-20, cutout"
CUTOUT_RECIPE = dict(batch_size=128, lr=0.2, warmup_epochs=0.0, shift=4, erase=0.0, cutmix=0.0)
CUTOUT_RECIPE |= dict(ema_decay=0.0, grad_clip=0.0)
COLUMNS = dict(
    name=("", ""),
    command=("command", "code"),
    parameters=("parameters", ",.0f"),
    million_multiply_adds=("million multiply-adds", ".1f"),
    seconds_for_60000_images=("seconds for 60,000 images", ".1f"),
    val_accuracy=("val accuracy", ".2%"),
    test_accuracy=("test accuracy", ".2%"),
)


# ---- The models ---------------------------------------------------------------------------------


def resnet() -> nn.Module:
    """A ResNet-18 (He et al. 2015) for small images, with as many channels as 600k allow."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    in_channels = 16
    for channels, stride in ((16, 1), (32, 2), (64, 2), (112, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        layers += [
            BasicBlock(in_channels, channels, stride, shortcut),
            BasicBlock(channels, channels),
        ]
        in_channels = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module(
        "head", nn.Linear(in_channels, 10)
    )  # by this name, `make_optimizers` leaves it to AdamW
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class CompactConvolutionalTransformer(nn.Module):
    """CCT-4/3x2 (Hassani et al. 2021, arXiv 2104.05704), of this project's blocks and pooling.

    Theirs has stochastic depth and dropout of attention, 0.1 each, and its positions start ten
    times as large.
    """

    def __init__(
        self, embed_dim: int = 128, depth: int = 4, num_heads: int = 2, mlp_ratio: float = 1.0
    ) -> None:
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
        tokens = (
            self.tokenizer(x.contiguous(memory_format=torch.channels_last))
            .flatten(2)
            .transpose(1, 2)
        )
        return self.head(self.pool(self.norm(self.blocks(tokens + self.pos_embed))))


class PreactBlock(nn.Module):
    """A pre-activation residual unit (He et al. 2016, arXiv 1603.05027).

    `is_first` activates the shortcut, too.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, is_first: bool = False
    ) -> None:
        super().__init__()
        self.is_first = is_first
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        is_changed = in_channels != channels
        self.shortcut = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False) if is_changed else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        return self.shortcut(y if self.is_first else x) + self.conv2(
            F.relu(self.bn2(self.conv1(y)))
        )


def preact_resnet() -> nn.Module:
    """The ResNet-20 of pre-activation units, 0.27M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False)]
    for in_channels, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [PreactBlock(in_channels, channels, stride, is_first=True)]
        layers += [PreactBlock(channels, channels, 1) for _ in range(2)]
    model = nn.Sequential(
        *layers, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
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
    center = torch.randint(
        0, dataset.IMAGE_SIZE + 1, (2, len(x), 1), generator=generator, device=x.device
    )
    place = torch.arange(dataset.IMAGE_SIZE, device=x.device)
    rows, columns = (place - center + side // 2) // side == 0  # (N, 28) each
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "this model": lambda: train.make_model(results.settings()),
    "ResNet-18": resnet,
    "CCT-4/3x2": CompactConvolutionalTransformer,
    CUTOUT: preact_resnet,
}


def multiply_adds(model: nn.Module) -> float:
    """Multiply-adds of one image's forward pass; PyTorch counts two operations each."""
    with FlopCounterMode(display=False) as counter:
        train.predict(model, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    return counter.get_total_flops() / 2


# ---- Training -----------------------------------------------------------------------------------


def start(name: str, **changes: object) -> Run:
    """A run of one of `PEERS` by the common recipe, or its own, with some settings changed."""
    recipe = CUTOUT_RECIPE if name == CUTOUT else RECIPE
    config = results.settings(**recipe | changes)
    torch.manual_seed(config.seed)
    run = train.start_run(config, model=PEERS[name]())
    if name == CUTOUT:
        options = dict(momentum=0.9, nesterov=True, weight_decay=1e-4)
        run.optimizers = [torch.optim.SGD(run.model.parameters(), lr=0.0, **options)]
        run.compiled = lambda x: run.model(cutout(x, run.generator))
    return run


def save(run: Run, path: Path) -> None:
    """Save what the next epoch needs."""
    state = dict(
        config=vars(run.config), history=run.history, ema=run.ema.state_dict(), run=run.state_dict()
    )
    with whole_file(path) as file:
        torch.save(state, file)


def resume(run: Run, path: Path) -> None:
    """Bring a new run to where the saved one stopped."""
    saved = torch.load(path)
    if saved["config"] != vars(run.config):
        raise SystemExit(f"peers.py: error: {path} is of other settings: name another folder")
    run.load_state_dict(saved["run"])
    run.ema.load_state_dict(saved["ema"])
    run.history = saved["history"]


def fit(runs: dict[str, Run], epochs: int, folder: Path | None) -> None:
    """Train the runs, an epoch of each in turn; save each in the folder, and go on from there."""
    states = {name: folder / f"{name.replace('/', '-')}.pt" for name in runs if folder}
    for name, path in states.items():
        if path.exists():
            resume(runs[name], path)
    for epoch in range(epochs):
        for name, run in runs.items():
            if epoch < len(run.history):
                continue
            started = time.perf_counter()
            row = train.train_epoch(run, epoch)
            run.history.append(dict(images=row["images"], seconds=time.perf_counter() - started))
            if folder:
                save(run, states[name])


def row_of(name: str, run: Run, args: argparse.Namespace) -> results.Row:
    """The row of a trained model in peers.csv, or in seeds.csv if it was trained on all images."""
    model = run.ema.cpu()
    command = f'python benchmarks/peers.py --train "{name}" --epochs {args.epochs}'
    test_split = dataset.load(args.data_dir, train=False)
    if not args.val_size:
        minutes = sum(row["seconds"] for row in run.history) / 60
        figures = seeds.figures_of(model, *test_split)
        return (
            dict(command=f"{command} --val-size 0", seed=args.seed, minutes=round(minutes, 1))
            | figures
        )
    images, labels = (tensor.cpu() for tensor in run.held_out["val"])
    right = train.predict(model, images).argmax(dim=1) == labels
    seconds = statistics.median(row["seconds"] / row["images"] for row in run.history)
    return dict(
        name=name,
        command=f"{command} --seed {args.seed}",
        parameters=sum(p.numel() for p in model.parameters()),
        million_multiply_adds=round(multiply_adds(model) / 1e6, 1),
        seconds_for_60000_images=round(60_000 * seconds, 1),
        val_accuracy=round(right.double().mean().item(), 4),
        **robustness.measure(model, *test_split),
    )


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    three = [name for name in PEERS if name != CUTOUT]
    parser.add_argument(
        "--train", nargs="+", choices=PEERS, default=three, help="(default: all but the last)"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--val-size", type=int, default=5000)
    parser.add_argument(
        "--state", type=Path, metavar="FOLDER", help="save every epoch here, and go on from it"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.table:
        processes.set_threads()
        changes = dict(
            epochs=args.epochs, val_size=args.val_size, seed=args.seed, data_dir=args.data_dir
        )
        runs = {name: start(name, **changes) for name in args.train}
        fit(runs, args.epochs, args.state)
        for name, run in runs.items():
            row = row_of(name, run, args)
            if args.val_size:
                results.add(args.output, row, "name")
            else:
                results.add(seeds.TABLE, row, "command", "seed")
    results.print_table(results.read(args.output), COLUMNS)


if __name__ == "__main__":
    main()
