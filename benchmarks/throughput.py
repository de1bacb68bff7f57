"""Images per second of this model, against a per-sample data loader, other small models and the machine's ceiling.

    python benchmarks/throughput.py                    the shape of --recipe fast
    python benchmarks/throughput.py --recipe default

Everything takes turns in this one process with one batch size; the medians of several rounds are compared. A training
step is whole: batch, augmentation, forward, backward, optimiser, average. "per-sample loader" is the same step fed by
torchvision's transforms of one image at a time and a `DataLoader` with two workers, which start before each of its
rounds and end after it. "batch size 2" is the size that the re-created project trains with. The ceiling is the rate of
large matrix products in the type that each computes in.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
import step_time

import dataset
import train
from training.processes import set_threads

STEPS = 4  # per round


class PerSample(Dataset):
    """The training images one by one, as `torchvision.datasets.FashionMNIST` gives them: a picture, transformed."""

    def __init__(self, data_dir: str, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.labels = dataset.load(data_dir, train=True)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0].numpy())), int(self.labels[index])


def loader(data_dir: str, config: SimpleNamespace) -> DataLoader:
    """The usual way: per-sample transforms in two worker processes, without CutMix."""
    steps = [transforms.RandomHorizontalFlip()] if config.flip else []
    if config.shift:
        steps.append(transforms.RandomCrop(dataset.IMAGE_SIZE, padding=config.shift))
    steps += [transforms.ToTensor(), transforms.Normalize(dataset.MEAN, dataset.STD)]
    if config.erase:
        steps.append(transforms.RandomErasing(config.erase, value="random"))
    split = PerSample(data_dir, transforms.Compose(steps))
    return DataLoader(split, batch_size=config.batch_size, shuffle=True, drop_last=True, num_workers=2)


def seconds_of(step: Callable[[], object], repeats: int = STEPS) -> float:
    """Seconds of one of `repeats` calls, after one that is not counted."""
    step()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def print_table(
    models: dict[str, nn.Module],
    training: dict[str, list[float]],
    inference: dict[str, list[float]],
    ceiling: float,
) -> None:
    """Print a line for each way to train, from seconds per image and operations per second in units of 1e9."""
    rates = {name: 1 / statistics.median(seconds) for name, seconds in training.items()}
    inference_rates = {name: 1 / statistics.median(seconds) for name, seconds in inference.items()}
    print("| | M multiply-adds | training images/s | ratio | of the ceiling | inference images/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, rate in rates.items():
        millions = step_time.multiply_adds(models.get(name, models["this model"])) / 1e6
        share = rate * 6 * millions / 1e3 / ceiling
        cells = [f"{millions:.1f}", f"{rate:.0f}", f"{rate / rates['this model']:.2f}", f"{share:.0%}", "", ""]
        if name in inference:
            cells[-2] = f"{inference_rates[name]:.0f}"
            cells[-1] = f"{inference_rates[name] / inference_rates['this model']:.2f}"
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nInference is in float32. A training step counts three times the multiply-adds of a forward pass.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fast", choices=train.RECIPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=train.SETTINGS["precision"][1])
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    set_threads()
    config = step_time.settings_of(args.recipe, args.precision)
    batch_size = config.batch_size
    images = torch.randint(0, 256, (batch_size, 1, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE), dtype=torch.uint8)
    models: dict[str, nn.Module] = {"this model": step_time.build(config)}
    models |= {name: peers.PEERS[name]() for name in ("ResNet-18", "CCT-4/3x2")}
    steps = {name: step_time.training_step(model, config) for name, model in models.items()}
    small = SimpleNamespace(**vars(config) | dict(batch_size=2))
    small_step = step_time.training_step(step_time.build(config), small)
    batches = loader(args.data_dir, config)
    from_loader = step_time.training_step(step_time.build(config), config, batches=lambda: next(iterator))

    iterator = iter(())
    training: dict[str, list[float]] = {}
    inference: dict[str, list[float]] = {}
    ceiling: list[float] = []
    for number in range(args.rounds + 1):  # the first warms up
        if number == 1:
            training, inference, ceiling = {}, {}, []
        for name, step in steps.items():
            training.setdefault(name, []).append(seconds_of(step) / batch_size)
        training.setdefault("this model, batch size 2", []).append(seconds_of(small_step, 64) / 2)
        iterator = iter(batches)
        for _ in range(2 * batches.num_workers * batches.prefetch_factor):
            from_loader()  # until what the workers had ahead is used up
        training.setdefault("this model, per-sample loader", []).append(seconds_of(from_loader) / batch_size)
        iterator = iter(())  # ends the workers
        for name, model in models.items():
            inference.setdefault(name, []).append(seconds_of(lambda m=model: train.predict(m, images)) / batch_size)
        ceiling.append(step_time.matrix_rate(config.precision))

    median = statistics.median(ceiling)
    print(
        f"--recipe {args.recipe}: batch size {batch_size}, {config.precision}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; ceiling {median:.0f} GFLOP/s\n"
    )
    print_table(models, training, inference, median)


if __name__ == "__main__":
    main()
