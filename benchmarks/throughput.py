"""Images per second of this model, against a per-sample data loader, other small models and the machine's ceiling.

    python benchmarks/throughput.py                    the shape of --recipe fast
    python benchmarks/throughput.py --recipe default

Everything takes turns in this one process with one batch size; the medians of several rounds are compared. A training
step is whole: batch, augmentation, forward, backward, optimiser, average. "per-sample loader" is the same step fed by
torchvision's data set, per-sample transforms and a `DataLoader` with two workers, which start before each of its rounds
and end after it. "batch size 2" is the size that the re-created project trains with. The ceiling is the rate of large
matrix products in the type that each computes in.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FashionMNIST

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
import step_time

import dataset
import train
from model import HybridClassifier

STEPS = 4  # per round


def loader(data_dir: str, settings: dict, batch_size: int) -> DataLoader:
    """The usual way: per-sample transforms in two worker processes."""
    steps = [transforms.RandomHorizontalFlip()] if settings["flip"] else []
    if settings["shift"]:
        steps.append(transforms.RandomCrop(dataset.IMAGE_SIZE, padding=settings["shift"]))
    steps += [transforms.ToTensor(), transforms.Normalize(dataset.MEAN, dataset.STD)]
    if settings["erase"]:
        steps.append(transforms.RandomErasing(settings["erase"], value="random"))
    split = FashionMNIST(data_dir, train=True, transform=transforms.Compose(steps))
    return DataLoader(split, batch_size=batch_size, shuffle=True, num_workers=2)


def seconds_of(step: Callable[[], None], repeats: int = STEPS) -> float:
    """Seconds of one of so many calls, after one that is not counted."""
    step()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fast", choices=train.RECIPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=train.CHOICES["precision"])
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    settings = train.choose_settings(dict(recipe=args.recipe))
    batch_size = settings["batch_size"]
    precision = train.choose_precision(args.precision, torch.device("cpu"))
    dataset.prepare(args.data_dir)
    images = torch.randint(0, 256, (batch_size, 1, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE), dtype=torch.uint8)

    def this_model() -> HybridClassifier:
        return HybridClassifier(step_time.shape_of(settings))

    builders = {"this model": this_model} | {name: peers.PEERS[name] for name in ("ResNet-18", "CCT-4/3x2")}
    models: dict[str, nn.Module] = {name: build() for name, build in builders.items()}
    options = dict(precision=precision, settings=settings)
    steps = {name: step_time.training_step(model, batch_size, **options) for name, model in models.items()}
    small = step_time.training_step(this_model(), 2, **options)
    batches = loader(args.data_dir, settings, batch_size)
    from_loader = step_time.training_step(this_model(), batch_size, **options, batches=lambda: next(iterator))

    iterator = iter(())
    training: dict[str, list[float]] = {}
    inference: dict[str, list[float]] = {}
    ceiling: list[float] = []
    for number in range(args.rounds + 1):  # the first warms up
        if number == 1:
            training, inference, ceiling = {}, {}, []
        for name, step in steps.items():
            training.setdefault(name, []).append(seconds_of(step) / batch_size)
        training.setdefault("this model, batch size 2", []).append(seconds_of(small, 64) / 2)
        iterator = iter(batches)
        for _ in range(2 * batches.num_workers * batches.prefetch_factor):
            from_loader()  # until what the workers had ahead is used up
        training.setdefault("this model, per-sample loader", []).append(seconds_of(from_loader) / batch_size)
        iterator = iter(())  # ends the workers
        for name, model in models.items():
            inference.setdefault(name, []).append(seconds_of(lambda m=model: train.predict(m, images)) / batch_size)
        ceiling.append(step_time.matrix_rate(precision))

    print(
        f"--recipe {args.recipe}: batch size {batch_size}, {precision}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; ceiling "
        f"{statistics.median(ceiling):.0f} GFLOP/s\n"
    )
    base = {id(table): 1 / statistics.median(table["this model"]) for table in (training, inference)}
    print("| | M multiply-adds | training images/s | ratio | of the ceiling | inference images/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, seconds in training.items():
        millions = step_time.multiply_adds(models.get(name, models["this model"])) / 1e6
        rate = 1 / statistics.median(seconds)
        share = rate * 6 * millions / 1e3 / statistics.median(ceiling)
        cells = [f"{millions:.1f}", f"{rate:.0f}", f"{rate / base[id(training)]:.2f}", f"{share:.0%}"]
        if name in inference:
            rate = 1 / statistics.median(inference[name])
            cells += [f"{rate:.0f}", f"{rate / base[id(inference)]:.2f}"]
        else:
            cells += ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nInference is in float32. A training step counts three times the multiply-adds of a forward pass.")


if __name__ == "__main__":
    main()
