"""How fast: training steps, beside other programs, and heatmaps.

    python benchmarks/speed.py steps       a step of --recipe fast in several settings
    python benchmarks/speed.py busy        while other processes keep the cores busy
    python benchmarks/speed.py heatmaps    against captum and grad-cam, which it needs:
                                           pip install --no-deps grad-cam ttach

What is compared takes turns, and the medians count.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import peers
import results
import time_to_accuracy
import torch
from torch import Tensor

import dataset
import train
from gradcam import GradCAM
from model import SHIPPED_CHECKPOINT, load_checkpoint

ROUNDS = 5
BUSY = {  # flags of the command
    "as this project does it": "",
    "PyTorch's threads": f"--threads {os.cpu_count()}",
    "one thread": "--threads 1",
}


def median_seconds(calls: dict[str, Callable]) -> dict[str, float]:
    """The median seconds of each call; they take turns, as the machine's speed drifts."""
    rounds = []
    for _ in range(ROUNDS + 1):
        rounds.append({name: timeit.timeit(call, number=1) for name, call in calls.items()})
    del rounds[0]  # it warms up
    return {name: statistics.median(each[name] for each in rounds) for name in calls}


def matrix_rate(precision: str) -> float:
    """Of products of 2048x2048 matrices, in 1e9 operations a second; a multiply-add is two."""
    a = torch.randn(2048, 2048, dtype=getattr(torch, precision))
    seconds = median_seconds({"": lambda: a @ a})[""]
    return 2 * 2048**3 / seconds / 1e9


def steps(args: argparse.Namespace) -> Iterator[results.Row]:
    """A whole step of the fast recipe, with one setting changed at a time."""
    changes = {
        "--recipe fast": {},
        "float32": dict(precision="float32"),
        "batch size 512": dict(batch_size=512),
        "AdamW": dict(optimizer="adamw"),
        "no Transformer block": dict(depth=0),
    }
    runs, calls, rates = {}, {}, {}
    for name, change in changes.items():
        config = results.settings("fast", data_dir=args.data_dir, device="cpu", **change)
        run = runs[name] = train.start_run(config)
        index = torch.arange(config.batch_size)
        calls[name] = partial(train.training_step, run, index, lr=1e-3, decay=0.999)
    for name, seconds in median_seconds(calls).items():
        run = runs[name]
        rates[name] = run.config.batch_size / seconds
        # A step counts as three forward passes.
        gflops = rates[name] * 6 * peers.multiply_adds(run.model) / 1e9
        yield dict(
            section="steps",
            setting=name,
            per_second=round(rates[name]),
            ratio=rates[name] / rates["--recipe fast"],
            gflops=round(gflops),
            fraction_of_peak=gflops / matrix_rate(run.config.precision),
        )


def busy(args: argparse.Namespace) -> Iterator[results.Row]:
    """The fast recipe beside other processes; the ratio is to PyTorch's own threads alone."""
    short = "--recipe fast --epochs 1 --train-size 6400 --quiet"
    speeds = defaultdict(list)
    for _, others, name in itertools.product(range(ROUNDS), range(3), BUSY):
        loop = [sys.executable, "-c", "while True: pass"]
        loops = [subprocess.Popen(loop) for _ in range(others)]
        try:
            row = time_to_accuracy.measure(f"{short} {BUSY[name]}".split(), args.data_dir)
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        speeds[f"{name}, beside {others} busy processes"].append(row["images_per_second"])
    alone = statistics.median(speeds["PyTorch's threads, beside 0 busy processes"])
    for setting, values in speeds.items():
        speed = statistics.median(values)
        yield dict(section="busy", setting=setting, per_second=speed, ratio=speed / alone)


def heatmaps(args: argparse.Namespace) -> Iterator[results.Row]:
    """Grad-CAM at the end of the shipped model's stem."""
    from captum.attr import LayerAttribution, LayerGradCam
    from pytorch_grad_cam import GradCAM as PackageGradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    images, labels = dataset.load(args.data_dir, train=False)
    ours, captums = GradCAM(model, "stem"), LayerGradCam(model, model.stem)

    def by_captum(x: Tensor, y: Tensor) -> Tensor:
        maps = captums.attribute(x, y, relu_attributions=True)
        return LayerAttribution.interpolate(maps, x.shape[-2:], "bilinear")

    def by_grad_cam(x: Tensor, y: Tensor) -> object:
        with PackageGradCAM(model, [model.stem]) as cam:
            return cam(x, [ClassifierOutputTarget(label) for label in y.tolist()])

    makers = {
        "this project": partial(ours, normalize=False),
        "captum": by_captum,
        "grad-cam": by_grad_cam,
    }
    for size in (1, 64, 256):
        batch = dataset.normalize(images[:size]), labels[:size]
        calls = {name: partial(make, *batch) for name, make in makers.items()}
        seconds = median_seconds(calls)
        for name, value in seconds.items():
            yield dict(
                section="heatmaps",
                setting=f"{name}, batch size {size}",
                per_second=round(size / value),
                ratio=seconds["this project"] / value,
            )


SECTIONS = dict(steps=steps, busy=busy, heatmaps=heatmaps)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("section", nargs="?", choices=SECTIONS, default="steps")
    results.run(parser, lambda args: SECTIONS[args.section](args), ("section", "setting"))


if __name__ == "__main__":
    main()
