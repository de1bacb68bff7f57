"""How fast: training steps, against other models, beside other programs, and heatmaps.

    python benchmarks/speed.py steps       a step of --recipe fast in several settings
    python benchmarks/speed.py models      against ResNet-18 and CCT, in training and in inference
    python benchmarks/speed.py busy        while other processes keep the cores busy
    python benchmarks/speed.py heatmaps    against captum and grad-cam, which it needs:
                                           pip install --no-deps grad-cam ttach

What is compared takes turns, and the medians count: compare ratios. A training step is whole. It
counts as three forward passes; the peak is the rate of large matrix products.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import peers
import results
import torch
from torch import Tensor, nn

import dataset
import train
from gradcam import GradCAM
from model import SHIPPED_CHECKPOINT, ModelConfig, load_checkpoint
from training import processes

COLUMNS = dict(
    setting=("", ""),
    per_second=("per second", ".0f"),
    ratio=("ratio", ".2f"),
    gflops=("GFLOP/s", ".0f"),
    fraction_of_peak=("fraction of peak", ".0%"),
)
BUSY = {  # flags of the command
    "as this project does it": [],
    "PyTorch's threads": ["--threads", str(os.cpu_count())],
    "one thread": ["--threads", "1"],
}


def matrix_rate(precision: str) -> float:
    """Of products of 2048x2048 matrices, in 1e9 operations a second; a multiply-add is two."""
    a = torch.randn(2048, 2048).to(getattr(torch, precision))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds) / 1e9


def row_of(setting: str, per_second: float, ratio: float) -> results.Row:
    return dict(setting=setting, per_second=round(per_second), ratio=ratio)


def training_step(config: SimpleNamespace, model: nn.Module | None = None) -> Callable[[], None]:
    """A whole step of `train.py` with these settings."""
    run = train.start_run(config, model=model)
    run.model.train()

    def step() -> None:
        index = torch.randint(len(run.train_index), (config.batch_size,))
        run.step(index, 1e-3, config.ema_decay)

    return step


def steps(args: argparse.Namespace) -> Iterator[results.Row]:
    """The fast recipe, with one setting changed at a time."""
    shape = ["whiten", *(field.name for field in fields(ModelConfig))]
    changes: dict[str, dict] = {
        "--recipe fast": {},
        "float32": dict(precision="float32"),
        "batch size 512": dict(batch_size=512),
        "AdamW": dict(optimizer="adamw"),
        "no Transformer block": dict(depth=0),
        "the default recipe's model": {name: train.SETTINGS[name][0] for name in shape},
    }
    configs, calls = {}, {}
    for name, change in changes.items():
        config = results.settings("fast", data_dir=args.data_dir, device="cpu", **change)
        configs[name], calls[name] = config, training_step(config)
    seconds = results.median_seconds(calls, args.rounds)
    rates = {name: configs[name].batch_size / value for name, value in seconds.items()}
    for name, config in configs.items():
        precision = processes.choose_precision(config.precision, torch.device("cpu"))
        gflops = rates[name] * 6 * peers.multiply_adds(train.make_model(config)) / 1e9
        row = row_of(name, rates[name], rates[name] / rates["--recipe fast"])
        yield row | dict(gflops=round(gflops), fraction_of_peak=gflops / matrix_rate(precision))


def models(args: argparse.Namespace) -> Iterator[results.Row]:
    """This model in the shape of the fast recipe, and two others of the default's size."""
    config = results.settings("fast", data_dir=args.data_dir, device="cpu")
    others = SimpleNamespace(**vars(config) | dict(whiten=False))
    nets = {"this model": train.make_model(config)}
    nets |= {name: peers.PEERS[name]() for name in ("ResNet-18", "CCT-4/3x2")}
    images = torch.randint(0, 256, (128, 1, 28, 28), dtype=torch.uint8)
    calls = {}
    for name, net in nets.items():
        calls[f"{name}, training"] = training_step(config if name == "this model" else others, net)
        calls[f"{name}, inference"] = partial(train.predict, net, images)
    seconds = results.median_seconds(calls, args.rounds)
    for name, value in seconds.items():
        own = seconds[f"this model, {name.split(', ')[1]}"]
        yield row_of(name, 128 / value, own / value)


def short_epoch(flags: list[str], data_dir: str) -> float:
    """Images per second that an epoch with these flags reports."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(results.ROOT / "train.py"), *flags]
        command += "--recipe fast --epochs 1 --train-size 6400 --quiet".split()
        command += ["--data-dir", data_dir, "--output-dir", folder]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"(\d+) images/s", said)[1])


def busy(args: argparse.Namespace) -> Iterator[results.Row]:
    """The fast recipe beside other processes; the ratio is to PyTorch's own threads alone."""
    speeds = {(name, others): [] for others in range(3) for name in BUSY}
    for _ in range(args.rounds):
        for name, others in speeds:
            loop = [sys.executable, "-c", "while True: pass"]
            loops = [subprocess.Popen(loop) for _ in range(others)]
            try:
                speeds[name, others].append(short_epoch(BUSY[name], args.data_dir))
            finally:
                for loop in loops:
                    loop.kill()
                    loop.wait()
    alone = statistics.median(speeds["PyTorch's threads", 0])
    for (name, others), values in speeds.items():
        speed = statistics.median(values)
        yield row_of(f"{name}, beside {others} busy processes", speed, speed / alone)


def heatmaps(args: argparse.Namespace) -> Iterator[results.Row]:
    """Grad-CAM at the end of the shipped model's stem; tests compare the maps with captum's."""
    from captum.attr import LayerAttribution, LayerGradCam
    from pytorch_grad_cam import GradCAM as PackageGradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    layer = model.get_submodule(model.stage_ends()[-1])
    images, labels = dataset.load(args.data_dir, train=False)
    ours, captums = GradCAM(model, layer), LayerGradCam(model, layer)

    def by_project(x: Tensor, y: Tensor) -> Tensor:
        return ours(x, y, normalize=False)

    def by_captum(x: Tensor, y: Tensor) -> Tensor:
        maps = captums.attribute(x, y, relu_attributions=True)
        return LayerAttribution.interpolate(maps, x.shape[-2:], "bilinear").detach().squeeze(1)

    def by_grad_cam(x: Tensor, y: Tensor) -> Tensor:
        with PackageGradCAM(model, [layer]) as cam:
            return torch.from_numpy(cam(x, [ClassifierOutputTarget(int(label)) for label in y]))

    makers = {"this project": by_project, "captum": by_captum, "grad-cam": by_grad_cam}
    for size in (1, 64, 256):
        batch = dataset.normalize(images[:size]), labels[:size]
        calls = {name: partial(make, *batch) for name, make in makers.items()}
        seconds = results.median_seconds(calls, args.rounds)
        for name, value in seconds.items():
            ratio = seconds["this project"] / value
            yield row_of(f"{name}, batch size {size}", size / value, ratio)


SECTIONS = dict(steps=steps, models=models, busy=busy, heatmaps=heatmaps)


def main() -> None:
    parser = results.make_parser(__file__, __doc__)
    parser.add_argument("section", nargs="?", choices=SECTIONS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    processes.set_threads()
    for section in [args.section] if args.section else SECTIONS:
        for row in [] if args.table else SECTIONS[section](args):
            results.add(args.output, dict(section=section) | row, "section", "setting")
        rows = [row for row in results.read(args.output) if row["section"] == section]
        print(f"\n{section}\n")
        results.print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
