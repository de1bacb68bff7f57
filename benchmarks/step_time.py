"""Where the time of a training step goes: this model in several settings, side by side, as ratios to the recipe's own.

    python benchmarks/step_time.py                      the fast recipe
    python benchmarks/step_time.py --recipe default     another one
    python benchmarks/step_time.py --profile            the parts of its step, PyTorch's operations, and the start-up

Every setting runs in this one process, in turn, for several rounds; the medians are compared, so that a machine whose
speed drifts does not favour one of them. The ceiling is what large matrix products reach in the same process.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import model as model_module
import train
from model import HybridClassifier, ModelConfig
from training import optim, processes, report
from training.settings import choose_settings

ROOT = Path(__file__).resolve().parent.parent


def settings_of(recipe: str = "default", precision: str = "auto", **changes: object) -> SimpleNamespace:
    """The settings of a recipe on the CPU, some of them changed."""
    precision = processes.choose_precision(precision, torch.device("cpu"))
    return choose_settings(train.SETTINGS, train.RECIPES, dict(recipe=recipe, precision=precision) | changes)


def build(config: SimpleNamespace) -> HybridClassifier:
    """This project's model in the shape that the settings give it; with --whiten, its first layer is frozen."""
    model = HybridClassifier(ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)}))
    model.stem.first.requires_grad_(not config.whiten)
    return model


def multiply_adds(model: torch.nn.Module) -> int:
    """Multiply-adds of one image's forward pass in convolutions, linear layers and `model.Attention`."""
    total = 0

    def count(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            total += output[0].numel() * module.in_features
        elif isinstance(module, model_module.Attention):
            total += 2 * output.shape[1] ** 2 * output.shape[2]

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    train.predict(model, torch.zeros(1, 1, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return total


def matrix_rate(precision: str) -> float:
    """Operations per second, in units of 1e9, of products of 2048x2048 matrices; a multiply-add is two."""
    a = torch.randn(2048, 2048).to(getattr(torch, precision))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds) / 1e9


def convolution_rate(channels: int, size: int, groups: int, precision: str) -> float:
    """Operations per second, in units of 1e9, of a 3x3 convolution of 128 images, forward and backward."""
    options = dict(dtype=getattr(torch, precision), memory_format=torch.channels_last)
    x = torch.randn(128, channels, size, size).to(**options).requires_grad_()
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False).to(**options)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        y = layer(x)
        y.backward(y.detach())
        seconds.append(time.perf_counter() - started)
    return 3 * 2 * 128 * layer.weight.numel() * size**2 / statistics.median(seconds) / 1e9


def make_run(
    model: torch.nn.Module,
    config: SimpleNamespace,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizers: list[torch.optim.Optimizer] | None = None,
) -> SimpleNamespace:
    """What `train.training_step` works on, as `train.train` makes it but without teachers; or with other optimisers."""
    run = SimpleNamespace(model=model, config=config, images=images, labels=labels, teachers=[])
    run.ema = copy.deepcopy(model).eval().requires_grad_(False)
    run.optimizers = optimizers or optim.make_optimizers(model, config.optimizer, config.weight_decay)
    run.compiled = torch.compile(model, dynamic=False) if config.compile else model
    run.generator = torch.Generator(images.device)
    return run


def training_step(
    model: torch.nn.Module,
    config: SimpleNamespace,
    channels_last: bool = True,
    fused_attention: bool = False,
    batches: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Callable[[], None]:
    """One whole step of `train.py`, augmentation and average included; a recipe's teachers are left out.

    Args:
        batches: returns normalised images and labels, instead of a batch taken from 4,096 images and augmented.
    """
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    images = torch.randint(0, 256, (4096, 1, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE), dtype=torch.uint8)
    run = make_run(model, config, images, torch.randint(0, len(dataset.CLASS_NAMES), (4096,)))

    def step() -> None:
        index = torch.randint(0, len(images), (config.batch_size,))
        batch = (lambda *_: batches()) if batches else train.augmented_batch
        attention = patch.object(model_module, "FUSED_ATTENTION", fused_attention)
        with attention, patch.object(train, "augmented_batch", batch):
            train.training_step(run, index, 1e-3, config.ema_decay)

    return step


def images_per_second(steps: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, float]:
    """The median speed of each step; the steps, given with their batch sizes, take turns."""
    for step, _ in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, batch_size) in steps.items():
            started = time.perf_counter()
            for _ in range(repeats := max(1, 256 // batch_size)):
                step()
            seconds[name].append((time.perf_counter() - started) / (repeats * batch_size))
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def profile(config: SimpleNamespace, steps: int = 20) -> None:
    """Print the parts of a step, PyTorch's operations by the time spent in themselves, and what the start-up takes."""
    step = training_step(build(config), config)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            started = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return call

    parts = [
        ("augmentation", train, "augmented_batch"),
        ("forward pass and loss", train, "training_loss"),
        ("backward pass", torch.Tensor, "backward"),
        ("clipping of the gradient", torch.nn.utils, "clip_grad_norm_"),
        ("Muon", optim.Muon, "step"),
        ("AdamW", torch.optim.AdamW, "step"),
        ("average of the weights", optim, "update_ema"),
    ]
    for _ in range(3):
        step()
    with ExitStack() as stack:
        for name, owner, attribute in parts:
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        started = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - started
    seconds["the rest: indexing, Python"] = total - sum(seconds.values())
    print(f"\n| part of a step of {1000 * total / steps:.0f} ms | share |\n|---|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value / total:.1%} |")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    operations = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in operations)
    print("\n| operation | share |\n|---|---:|")
    for row in operations[:16]:
        print(f"| {row.key} | {row.self_cpu_time_total / total:.1%} |")
    profile_start_up()


def profile_start_up() -> None:
    """Print what a run takes besides its steps."""
    code = "import time; t = time.perf_counter(); import train; print(time.perf_counter() - t)"
    imports = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    started = time.perf_counter()
    _, labels = dataset.load(ROOT / "data", train=True)
    loaded = time.perf_counter()
    report.class_report(labels, labels)
    print(
        f"\nimports {float(imports):.1f} s, checking and reading 60,000 images {loaded - started:.2f} s, "
        f"a classification report of them {time.perf_counter() - loaded:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="fast", choices=train.RECIPES)
    parser.add_argument("--precision", default="auto", choices=train.SETTINGS["precision"][1])
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which first takes a minute")
    parser.add_argument("--profile", action="store_true", help="the parts of a step instead of other settings")
    args = parser.parse_args()
    processes.set_threads()
    config = settings_of(args.recipe, args.precision)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if args.profile:
        return profile(config)
    own = f"--recipe {args.recipe}, batch size {config.batch_size}"
    shape = {name: train.SETTINGS[name][0] for name in (*(field.name for field in fields(ModelConfig)), "whiten")}
    variants: dict[str, tuple[dict, dict]] = {  # settings that change, options of training_step
        own: ({}, {}),
        "float32": (dict(precision="float32"), {}),
        "PyTorch's fused attention kernel": ({}, dict(fused_attention=True)),
        "contiguous memory instead of channels-last": ({}, dict(channels_last=False)),
        "AdamW instead of Muon": (dict(optimizer="adamw"), {}),
        **{f"batch size {size}": (dict(batch_size=size), {}) for size in (2, 32, 128, 512)},
        "no Transformer blocks": (dict(depth=0), {}),
        "two Transformer blocks": (dict(depth=2), {}),
        "the default recipe's model": (shape, {}),
    }
    if args.compile:
        variants["torch.compile"] = (dict(compile=True), {})
    models, steps = {}, {}
    for name, (changes, options) in variants.items():
        changed = SimpleNamespace(**vars(config) | changes)
        models[name] = build(changed)
        steps[name] = training_step(models[name], changed, **options), changed.batch_size
    ceilings = [matrix_rate(config.precision)]
    rates = images_per_second(steps, args.rounds)
    ceilings.append(matrix_rate(config.precision))
    print("\n| setting | images/s | ratio | M multiply-adds |\n|---|---:|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates[own]:.2f} | {multiply_adds(models[name]) / 1e6:.1f} |")
    ceiling = statistics.mean(ceilings)  # before and after
    used = rates[own] * 3 * 2 * multiply_adds(models[own]) / 1e9  # the backward pass costs twice the forward pass
    print(
        f"\n{own} computes {used:.0f} GFLOP/s, {used / ceiling:.0%} of the {ceiling:.0f} GFLOP/s that large "
        f"{config.precision} matrix products reach; float32 ones reach {matrix_rate('float32'):.0f} GFLOP/s"
    )
    dense, depthwise = (convolution_rate(96, 14, groups, config.precision) for groups in (1, 96))
    print(f"a 3x3 convolution of 96 channels at 14x14: dense {dense:.0f}, depthwise {depthwise:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
