"""This model against the field's usual small ones: the same images, augmentation, optimiser, schedule and epochs.

    python benchmarks/peers.py                      print the table of peers.csv
    python benchmarks/peers.py --train "ResNet-18"  train one of them, test its last averaged weights, save its line
    python benchmarks/peers.py --time               measure seconds an epoch, all in turn, with nothing else running

Training takes the default recipe of `train.py`, for `--epochs`, and its 5,000 validation images choose nothing here.
"""

import argparse
import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import robustness
import step_time

import dataset
import train
from model import EncoderBlock, Pool
from training import optim, processes

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
    """CCT-4/3x2 (Hassani et al. 2021, arXiv 2104.05704), of this project's encoder blocks and attention pooling."""

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


PEERS: dict[str, Callable[[], nn.Module]] = {
    "this model": lambda: step_time.build(step_time.settings_of("default")),
    "ResNet-18": resnet,
    "CCT-4/3x2": CompactConvolutionalTransformer,
}


def train_peer(name: str, epochs: int, seed: int, data_dir: str) -> dict[str, object]:
    """Train one of `PEERS` and return its line of the table."""
    device = processes.choose_device("auto")
    config = step_time.settings_of("default", processes.choose_precision("auto", device), epochs=epochs, seed=seed)
    torch.manual_seed(seed)
    model = PEERS[name]().to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = optim.make_optimizers(model, config.optimizer, config.weight_decay)
    generator = torch.Generator(device).manual_seed(seed)
    images, labels = (tensor.to(device) for tensor in dataset.load(data_dir, train=True))
    train_index, val_index = (i.to(device) for i in dataset.split_indices(labels, config.val_size, seed))
    steps = len(train_index) // config.batch_size
    warmup_steps = round(min(config.warmup_epochs, epochs / 4) * steps)

    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(train_index), generator=generator, device=device)[: steps * config.batch_size]
        batches = tqdm(train_index[order].split(config.batch_size), f"{name}, epoch {epoch + 1}", mininterval=5)
        for step, index in enumerate(batches, start=epoch * steps):
            loss, _ = train.training_loss(
                model, [], *train.augmented_batch(images[index], labels[index], generator, config), config
            )
            loss.backward()
            lr = optim.learning_rate(step, epochs * steps, warmup_steps, config.lr)
            decay = optim.averaging_decay(step, epochs * steps, config.ema_decay, config.swa_share)
            optim.take_step(model, ema, optimizers, lr, decay, config.grad_clip)

    ema.cpu()
    right = train.predict(ema, images[val_index].cpu()).argmax(dim=1) == labels[val_index].cpu()
    return dict(
        name=name,
        command=f'python benchmarks/peers.py --train "{name}" --epochs {epochs} --seed {seed}',
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        million_multiply_adds=round(step_time.multiply_adds(ema) / 1e6, 1),
        seconds_for_60000_images="",
        val_accuracy=f"{right.double().mean().item():.2%}",
        **robustness.measure(ema, *dataset.load(data_dir, train=False), seed=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=PEERS, help="train this one and save its line")
    parser.add_argument("--time", action="store_true", help="measure the seconds for 60,000 images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    if args.train or args.time:
        processes.set_threads()
    row = train_peer(args.train, args.epochs, args.seed, args.data_dir) if args.train else None
    with open(TABLE, newline="") as file:  # after the training, since another one may have ended meanwhile
        rows: list[dict] = list(csv.DictReader(file))
    if row:
        rows = [*(other for other in rows if other["name"] != row["name"]), row]
    rows.sort(key=lambda row: list(PEERS).index(row["name"]))
    if args.time:
        config = step_time.settings_of("default")
        steps = {name: (step_time.training_step(build(), config), config.batch_size) for name, build in PEERS.items()}
        rates = step_time.images_per_second(steps, rounds=20)
        for row in rows:
            row["seconds_for_60000_images"] = round(60_000 / rates[row["name"]], 1)
    if args.train or args.time:
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("| | " + " | ".join(row["name"] for row in rows) + " |\n|---|" + "---:|" * len(rows))
    for name in rows[0]:
        if name != "name":
            cells = [f"`{row[name]}`" if name == "command" else str(row[name]) for row in rows]
            print(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
