"""Train the CNN + Transformer hybrid on Fashion-MNIST.

    python train.py                                     train with the defaults below, then test once
    python train.py --recipe fast                       minutes on two CPU cores
    python train.py --recipe record                     the most accurate: two hours on two CPU cores
    python train.py --recipe taught                     taught by the shipped model, in less than an hour
    python train.py --epochs 5 --lr 1e-3                every default is also a flag; --help lists them
    python train.py --resume                            go on with an interrupted run
    torchrun --nproc-per-node=2 train.py                in two processes, on two GPUs or two CPU cores
    python train.py --evaluate checkpoints/best.pt      only the last step: evaluate a checkpoint on the test split

The best checkpoint by validation accuracy is kept as `checkpoints/best.pt`, the state of the run as
`checkpoints/last.pt`. The test split is evaluated once, at the end, and chooses nothing.
"""

import argparse
import copy
import csv
import io
import itertools
import math
import os
import platform
import re
import reprlib
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, classification_report
from tqdm import tqdm

import dataset
from model import (
    MAX_CHECKPOINT_BYTES,
    MAX_PARAMETERS,
    CheckpointError,
    HybridClassifier,
    ModelConfig,
    load_checkpoint,
    save_checkpoint,
)
from training.processes import set_threads

# ---------------------------------------------------------------------------------------------------------------------
# The defaults. Edit a value here, or override it on the command line: stem_dims is --stem-dims, and so on.

DEFAULTS: dict[str, tuple[Any, str]] = dict(
    recipe=("default", "which of the recipes below replaces some of these values"),
    # data
    data_dir=("data", "folder with the four files of Fashion-MNIST; they are put there if it lacks them"),
    val_size=(5000, "images held out of the 60,000 to choose the best epoch; 0 trains on all, keeps the last weights"),
    train_size=(0, "train on only so many of the remaining images, for a quick try; 0 takes them all"),
    # augmentation
    flip=(True, "mirror half of the images"),
    shift=(2, "move every image by up to so many pixels each way"),
    erase=(0.25, "probability that a rectangle of an image is replaced by noise"),
    # model
    stem_dims=((16, 32), "channels of the convolutional stem at 28x28 and at 14x14"),
    stem_blocks=((2, 2, 2), "residual blocks of the stem at 28x28, at 14x14 and at 7x7"),
    embed_dim=(96, "channels at 7x7, which is the width of a token"),
    depth=(1, "number of Transformer blocks"),
    num_heads=(3, "attention heads of a block; divides embed_dim"),
    mlp_ratio=(2.0, "hidden width of a block's MLP, in units of embed_dim"),
    pool=("attention", "how 49 tokens become one: attention or mean"),
    drop_path=(0.0, "stochastic depth of the last Transformer block"),
    # optimisation
    epochs=(30, "passes over the training images"),
    batch_size=(256, "images per step"),
    optimizer=("muon", "muon (for matrices and filters, AdamW for the rest) or adamw"),
    lr=(8e-3, "peak learning rate; after it a cosine down to 0"),
    warmup_epochs=(1.0, "epochs of linear warm-up, at most a quarter of the run"),
    weight_decay=(0.05, "decoupled weight decay of all matrices and filters"),
    label_smoothing=(0.1, "part of the target spread over all classes"),
    ema_decay=(0.999, "moving average of the weights, the ones evaluated and kept; 0 averages nothing"),
    grad_clip=(1.0, "largest norm of the gradient; 0 clips nothing"),
    # distillation
    teacher=(
        (),
        "checkpoints whose mean answer the model learns to give, besides the labels; none named, none learned from",
    ),
    teacher_weight=(0.9, "part of the loss that the teachers have, where there are any"),
    temperature=(1.0, "softens the answers of teachers and model before they are compared"),
    # system
    seed=(0, "of the split, the initial weights, the order and the augmentation"),
    device=("auto", "auto, cpu, cuda or mps; auto takes an accelerator where there is one"),
    precision=("auto", "auto, float32 or bfloat16; auto takes bfloat16 where the hardware computes in it"),
    compile=(False, "use torch.compile: a minute of compilation first, so for long runs"),
    output_dir=("checkpoints", "where checkpoints, history and pictures are written"),
    report_test=(False, "report on the test split after every epoch too; it chooses nothing"),
    quiet=(False, "one line an epoch: no bars, no reports"),
)
# Recipes: values that go together and replace the defaults above. Flags count over both.
RECIPES: dict[str, dict[str, Any]] = dict(
    default={},
    # Minutes on two CPU cores: a lighter model, too few epochs to overfit, on all 60,000 images.
    fast=dict(val_size=0, shift=1, erase=0.0, stem_blocks=(0, 2, 2), mlp_ratio=1.0, epochs=7, batch_size=128),
    # The most accurate: the shipped checkpoint is its seed 0, at the epoch that did best on the validation split.
    record=dict(stem_blocks=(3, 3, 2), epochs=80, erase=0.5),
    # The same model in a quarter of the epochs, on all 60,000 images, taught by the shipped one.
    taught=dict(val_size=0, stem_blocks=(3, 3, 2), epochs=20, erase=0.5, teacher=("checkpoints/shipped/model.pt",)),
)
# ---------------------------------------------------------------------------------------------------------------------

RANGES = dict(  # lowest and highest; whole numbers where they are written as such
    val_size=(0, 59_000),
    train_size=(0, 60_000),
    shift=(0, dataset.IMAGE_SIZE - 1),
    erase=(0.0, 1.0),
    stem_dims=(1, 256),
    stem_blocks=(0, 64),
    embed_dim=(1, 1024),
    depth=(0, 256),
    num_heads=(1, 1024),
    mlp_ratio=(0.01, 16.0),
    drop_path=(0.0, 0.99),
    epochs=(1, 10_000),
    batch_size=(1, 60_000),
    lr=(1e-9, 10.0),
    warmup_epochs=(0.0, 10_000.0),
    weight_decay=(0.0, 100.0),
    label_smoothing=(0.0, 0.99),
    ema_decay=(0.0, 0.999999),
    grad_clip=(0.0, 1e6),
    teacher_weight=(0.0, 1.0),
    temperature=(0.1, 100.0),
    seed=(0, 2**32 - 1),
)
CHOICES = dict(
    recipe=tuple(RECIPES),
    pool=("attention", "mean"),
    optimizer=("muon", "adamw"),
    device=("auto", "cpu", "cuda", "mps"),
    precision=("auto", "float32", "bfloat16"),
)
SEVERAL = ("stem_dims", "stem_blocks")  # these are rows of numbers
NOT_OF_THE_RUN = ("data_dir", "output_dir", "report_test", "quiet")  # may be given anew on --resume


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message is one line that says what to do."""


def complaint(name: str, value: Any) -> str | None:
    """What is wrong with a number of `RANGES`: "is not a whole number from 1 to 60,000"; None if nothing is."""
    low, high = RANGES[name]
    kinds, what = ((int,), "a whole number") if type(low) is int else ((int, float), "a number")
    if type(value) in kinds and low <= value <= high:  # NaN is not
        return None
    return f"is not {what} from {low:,} to {high:,}"


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse impossible settings, be they flags, edited defaults, or those of a run to resume.

    Args:
        settings: every name of `DEFAULTS` with its value.

    Raises:
        TrainingError: the message names the flag and what it may be.
        ValueError: the values do not make a model together.
    """
    for name in DEFAULTS:
        value, problem = settings[name], None
        if name in RANGES:
            values = value if name in SEVERAL and isinstance(value, tuple | list) else [value]
            problem = next((p for p in (complaint(name, v) for v in values) if p), None)
        elif name in CHOICES:
            is_choice = isinstance(value, str) and value in CHOICES[name]
            problem = None if is_choice else f"is unknown: give one of {', '.join(CHOICES[name])}"
        elif name == "teacher":
            if not isinstance(value, tuple | list) or not all(isinstance(path, str) for path in value):
                problem = "is no list of checkpoints: give their names as texts"
        elif name in ("data_dir", "output_dir"):
            problem = None if isinstance(value, str) and value else "is no folder: give its name as text"
        elif not isinstance(value, bool):
            problem = "is neither True nor False: make it one of them"
        if problem is None and name in ("val_size", "train_size") and 0 < value < len(dataset.CLASS_NAMES):
            problem = f"is too small: give 0, or at least {len(dataset.CLASS_NAMES)}, one per class"
        if problem:
            shown = " ".join(reprlib.repr(value).split())[:80]
            raise TrainingError(f"--{name.replace('_', '-')} {shown} {problem}")
    most = RANGES["train_size"][1] - settings["val_size"] - len(dataset.CLASS_NAMES)
    if settings["train_size"] > most:
        raise TrainingError(f"--train-size {settings['train_size']}: give at most {most:,}, or 0 for all that are left")
    own = {os.path.realpath(os.path.join(settings["output_dir"], name)) for name in ("best.pt", "last.pt")}
    if own & {os.path.realpath(path) for path in settings["teacher"]}:
        raise TrainingError("the teacher lies where this run saves its own checkpoints: give another --output-dir")
    ModelConfig(**{field.name: settings[field.name] for field in fields(ModelConfig)})


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def choose_device(name: str) -> torch.device:
    """Turn a flag into a device; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        TrainingError: the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise TrainingError(f"--device {name}: PyTorch sees no such device on this machine; try --device auto")
    return torch.device(name)


def is_one_of_several() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join_processes(device: torch.device) -> tuple[int, int]:
    """Meet the other processes that torchrun started, over NCCL on GPUs and gloo on CPUs.

    Returns:
        This process's rank and the number of processes; (0, 1) if torchrun did not start it.

    Raises:
        TrainingError: the device cannot take part.
    """
    if not is_one_of_several():
        return 0, 1
    if device.type == "mps":
        raise TrainingError("several processes train on CPUs or on CUDA devices: give --device cpu")
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank + 1} has no GPU of its own, this machine has {torch.cuda.device_count()}: "
                f"give torchrun a smaller --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)  # "cuda" is this one from now on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn a flag into the type that matrix products and convolutions compute in.

    "auto" takes bfloat16 only where the hardware has instructions for it. On a CPU without them a bfloat16 matrix
    product is some hundred times slower than a float32 one.
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        elif device.type == "cpu":
            cpu = torch.cpu.get_capabilities()
            fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        else:
            fast = False
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def autocast(device: torch.device, precision: torch.dtype) -> Any:
    """The context in which the forward pass computes in `precision`; weights and optimiser stay float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Convolution filters count as matrices of shape (out, in * height * width). The update is scaled as Liu et al. 2025
    (arXiv 2502.16982) propose, to the size of AdamW's, so that both take the same learning rate and weight decay.
    `torch.optim.Muon` takes no filters and computes in bfloat16, which many CPUs only emulate; this one is float32.
    """

    def __init__(self, params: list[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum, same_shape = group["lr"], group["momentum"], {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                same_shape.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in same_shape.items():
                updates = [p.grad.lerp(self.state[p]["momentum"], momentum).flatten(1) for p in params]
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-lr * scale)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix close to 1 by a quintic Newton-Schulz iteration (Jordan et al. 2024).

    A step multiplies the matrix by a polynomial of its Gram matrix. The polynomials commute, so they are multiplied
    with each other first, in the smaller dimension, and with the matrix once.

    Args:
        matrices: float32 (K, M, N), K matrices of one shape.
        steps: of the iteration; the singular values end between 0.7 and 1.2, those near 0 below.

    Returns:
        A tensor of the same shape.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(len(gram[0]), device=x.device)
    product = identity.expand_as(gram)
    for _ in range(steps):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def make_optimizers(model: nn.Module, kind: str, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon or AdamW (Loshchilov & Hutter 2019) for matrices and filters, AdamW without decay for the rest.

    The head and the single-channel first filters stay with AdamW in either case. The learning rate is set per step.
    """
    names = dict(model.named_parameters())
    matrices = {n for n, p in names.items() if p.ndim >= 2 and n != "pos_embed"}
    hidden = {n for n in matrices if kind == "muon" and min(names[n].flatten(1).shape) > len(dataset.CLASS_NAMES)}
    groups = [
        dict(params=[names[n] for n in names if n in matrices - hidden], weight_decay=weight_decay),
        dict(params=[names[n] for n in names if n not in matrices], weight_decay=0.0),
    ]
    fused = next(model.parameters()).device.type != "mps"
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)]
    if hidden:
        optimizers.append(Muon([names[n] for n in names if n in hidden], lr=0.0, weight_decay=weight_decay))
    return optimizers


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, torch.Tensor]]) -> None:
    """Take over the moving averages that a checkpoint has of every parameter; the rest follows from the settings.

    Raises:
        ValueError: they are not those of this optimiser and its parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    if type(state) is not dict or state.keys() != set(range(len(params))):
        raise ValueError("the optimiser's state is of other parameters")
    for averages, p in zip((state[i] for i in range(len(params))), params, strict=True):
        shapes = {name: torch.Size([]) if name == "step" else p.shape for name in names}
        if type(averages) is not dict or averages.keys() != names:
            raise ValueError("the optimiser's state is of another optimiser")
        for name, average in averages.items():
            if not is_plain(average) or average.shape != shapes[name] or average.dtype != torch.float32:
                raise ValueError("the optimiser's state does not fit its parameter")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all finite and have memory of their own."""
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and value.nbytes <= value.untyped_storage().nbytes()
        and bool(value.isfinite().all())
    )


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 (Loshchilov & Hutter 2017); `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights, and batch norm's statistics, a little towards the current ones.

    The first steps average over a shorter window, so that the random initial weights are soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averaged, current = list(ema.state_dict().values()), list(model.state_dict().values())
    is_float = [tensor.is_floating_point() for tensor in current]
    torch._foreach_lerp_(
        [a for a, f in zip(averaged, is_float, strict=True) if f],
        [c for c, f in zip(current, is_float, strict=True) if f],
        1 - decay,
    )
    for a, c, f in zip(averaged, current, is_float, strict=True):
        if not f:
            a.copy_(c)  # batch norm's counters


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Logits of uint8 images (N, 1, 28, 28) as a float32 tensor (N, 10); always in float32 and evaluation mode."""
    was_training = model.training
    model.eval()
    logits = [model(dataset.normalize(images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    model.train(was_training)
    return torch.cat(logits)


@torch.no_grad()
def teacher_probabilities(teachers: list[nn.Module], x: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean of the teachers' softened probabilities (N, 10) for normalised images (N, 1, 28, 28)."""
    return torch.stack([(teacher(x).float() / temperature).softmax(dim=1) for teacher in teachers]).mean(dim=0)


def distillation_loss(logits: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """How far the softened answer is from the teachers' (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        logits: of the model that learns, (N, 10).
        probabilities: of the teachers at the same temperature, (N, 10).
        temperature: above 0.

    Returns:
        The mean Kullback-Leibler divergence times temperature squared, so that its gradient keeps its size.
    """
    log_probabilities = (logits / temperature).log_softmax(dim=1)
    return F.kl_div(log_probabilities, probabilities, reduction="batchmean") * temperature**2


def training_loss(
    forward: Callable[[torch.Tensor], torch.Tensor],
    teachers: list[nn.Module],
    x: torch.Tensor,
    labels: torch.Tensor,
    precision: torch.dtype,
    config: SimpleNamespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy against the labels, smoothed (Szegedy et al. 2016), and the distance to the teachers' answer.

    Args:
        forward: the model, or what it was compiled to.
        teachers: in evaluation mode; none of them leaves the cross-entropy alone.
        x: normalised images (N, 1, 28, 28).
        labels: int64 (N,).
        precision: what the forward passes compute in.
        config: `label_smoothing`, `teacher_weight` and `temperature` of `DEFAULTS`.

    Returns:
        The mean loss, and the model's logits (N, 10).
    """
    with autocast(x.device, precision):
        logits = forward(x)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    if teachers:  # they see the very same variants of the images (Beyer et al. 2022, arXiv 2106.05237)
        with autocast(x.device, precision):
            targets = teacher_probabilities(teachers, x, config.temperature)
        distance = distillation_loss(logits.float(), targets, config.temperature)
        loss = (1 - config.teacher_weight) * loss + config.teacher_weight * distance
    return loss, logits


def take_step(
    model: nn.Module,
    ema_model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    lr: float,
    step: int,
    config: SimpleNamespace,
) -> None:
    """Take one step along the gradients, which are used up, and let the average follow.

    Args:
        lr: of this step, for every parameter.
        step: of the whole run, from 0.
        config: `grad_clip` and `ema_decay` of `DEFAULTS`.
    """
    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad()
    update_ema(ema_model, model, config.ema_decay, step)


def report(labels: torch.Tensor, predictions: torch.Tensor) -> str:
    """scikit-learn's classification report with the class names."""
    return classification_report(
        labels.cpu(),
        predictions.cpu(),
        labels=range(len(dataset.CLASS_NAMES)),
        target_names=dataset.CLASS_NAMES,
        digits=4,
        zero_division=0,
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def train(config: SimpleNamespace, resume: bool = False) -> Path:
    """Train a model and return the path of the best checkpoint.

    Args:
        config: every name of `DEFAULTS` with its value.
        resume: go on from `config.output_dir`/last.pt, which the configuration was read from.

    Raises:
        TrainingError: the loss is no longer finite, or the device is not there.
        dataset.DataError, ValueError, OSError: bad data, an impossible model, a folder that cannot be written.
    """
    check_settings(vars(config))
    device = choose_device(config.device)
    rank, world_size = join_processes(device)  # process 0 reports and saves; all of them compute
    say = print if rank == 0 else lambda *values, **options: None
    precision = choose_precision(config.precision, device)
    # A resumed run must compute as it began, so what "auto" meant is saved.
    chosen = dict(device=device.type, precision=str(precision).removeprefix("torch."))
    config = SimpleNamespace(**vars(config) | chosen)
    output_dir = Path(config.output_dir)
    best_path, last_path = output_dir / "best.pt", output_dir / "last.pt"
    if config.batch_size < world_size:
        raise TrainingError(
            f"--batch-size {config.batch_size}: give at least 1 image for each of {world_size} processes"
        )

    model_config = ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)})
    with torch.device("meta"):  # counts without taking the memory
        num_parameters = HybridClassifier(model_config).num_parameters()
    if 20 * num_parameters > MAX_CHECKPOINT_BYTES:  # weights, their average and the optimiser's state
        raise TrainingError(f"{num_parameters:,} parameters make checkpoints too large to load: make the model smaller")
    loaded_teachers = [load_checkpoint(path, device) for path in config.teacher]
    torch.manual_seed(config.seed)
    model = HybridClassifier(model_config).to(device, memory_format=torch.channels_last)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, config.optimizer, config.weight_decay)
    if rank:
        torch.manual_seed(config.seed + rank)  # stochastic depth is to drop other images in each process
    generator = torch.Generator(device).manual_seed(config.seed)  # the order of the images and their augmentation

    images, labels = (tensor.to(device) for tensor in dataset.load(config.data_dir, train=True))
    train_index, val_index = (i.to(device) for i in dataset.split_indices(labels, config.val_size, config.seed))
    for path, (_, checkpoint) in zip(config.teacher, loaded_teachers, strict=True):
        saw = checkpoint.get("train_config", {})
        val_size, seed = saw.get("val_size", 0), saw.get("seed", 0)
        if complaint("val_size", val_size) or complaint("seed", seed):
            raise CheckpointError(f"{path} does not say which images it was trained on: name another teacher")
        unseen = dataset.split_indices(labels, val_size, seed)[1].to(device)
        if not torch.isin(val_index, unseen).all():
            raise TrainingError(
                f"{path} was trained on images that are to validate this run, which would flatter it: give --val-size 0"
                + (f", or --val-size {val_size} --seed {seed} as it had" if val_size else "")
            )
    teachers = [teacher.requires_grad_(False) for teacher, _ in loaded_teachers]
    if config.train_size:
        subset = dataset.split_indices(labels[train_index], config.train_size, config.seed)[1]
        train_index = train_index[subset.to(device)]
    val_images, val_labels = images[val_index], labels[val_index]
    if config.report_test:
        test_images, test_labels = (tensor.to(device) for tensor in dataset.load(config.data_dir, train=False))

    # The batch size is that of all processes together. A last batch with less than an image for each is left out.
    left_out = len(train_index) % config.batch_size
    epoch_images = len(train_index) - (left_out if left_out < world_size else 0)
    if not epoch_images:
        raise TrainingError(f"{len(train_index)} images cannot be shared by {world_size} processes: train on more")
    steps_per_epoch = math.ceil(epoch_images / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(min(config.warmup_epochs, config.epochs / 4) * steps_per_epoch)

    say("\n".join(f"{name:16} {getattr(config, name)}" for name in DEFAULTS))
    processes = f"{world_size} processes with " if world_size > 1 else ""
    say(
        f"\n{num_parameters:,} parameters; device {device} ({processes}{torch.get_num_threads()} CPU threads), "
        f"{config.precision}; {len(train_index):,} training, {len(val_index):,} validation, "
        f"10,000 test images; torch {torch.__version__}"
    )
    if num_parameters > MAX_PARAMETERS:
        say(f"note: more than the {MAX_PARAMETERS:,} parameters that this project allows itself")

    epoch, step, order = 0, 0, None
    # The losses are summed apart for each process, so that bringing them together rounds nothing.
    loss_sum, predictions = torch.zeros(world_size, device=device), torch.zeros_like(train_index)
    history: list[dict[str, float]] = []
    best_epoch, best_accuracy, seconds_before = 0, -1.0, 0.0
    if resume:
        checkpoint = load_checkpoint(last_path)[1]
        saved = checkpoint["training"]
        processes = saved.get("processes", 1)
        if type(processes) is int and processes != world_size:  # batch norm and the last batch would be others
            raise TrainingError(
                f"the run to resume has {processes} processes, not {world_size}: give torchrun that "
                f"--nproc-per-node, or python for 1"
            )
        try:
            epoch, step, history = saved["epoch"], saved["step"], checkpoint["history"]
            best_epoch, best_accuracy = saved.get("best_epoch", 0), saved["best_accuracy"]
            seconds_before = saved["seconds"]
            if any(type(number) is not int for number in (processes, epoch, step, best_epoch)):
                raise ValueError("the position is not in whole numbers")
            if any(type(x) not in (int, float) or not abs(x) < 1e9 for x in (best_accuracy, seconds_before)):
                raise ValueError("accuracy or time is no number")
            if epoch != len(history) or epoch > config.epochs or not 0 <= step < steps_per_epoch:
                raise ValueError("the position is outside the run")
            tensors = [*saved["model"].values(), saved["generator"], saved["rng"], saved["loss_sum"]]
            tensors += [saved["order"], saved["predictions"]] if step else []
            if not all(is_plain(tensor) for tensor in tensors):
                raise ValueError("what should be a tensor is none")
            model.load_state_dict(dict(saved["model"]))
            ema_model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                load_optimizer_state(optimizer, state["state"])
            generator.set_state(saved["generator"])
            if rank == 0:
                torch.set_rng_state(saved["rng"])
            if device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"])
            if step:  # the run stopped within an epoch
                order = saved["order"].to(device)
                is_index = order.dtype == train_index.dtype and order.shape == (epoch_images,)
                if not is_index or not torch.isin(order, train_index).all():
                    raise ValueError("the order is of other images")
                predictions = torch.zeros_like(order)
                loss_sum[rank] = saved["loss_sum"].reshape(-1)[rank]
                if rank == 0:  # which saved what all of them had
                    predictions[: len(saved["predictions"])] = saved["predictions"].to(device)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{last_path} holds no position of this run: start anew without --resume, or use another copy of it"
            ) from error
        say(f"resuming at epoch {epoch + 1}, step {step} of {steps_per_epoch}")
    output_dir.mkdir(parents=True, exist_ok=True)
    forward = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)  # averages the gradients
    forward = torch.compile(forward) if config.compile else forward
    started, first_step, run_saved = time.perf_counter(), epoch * steps_per_epoch + step, resume

    def elapsed() -> float:
        return seconds_before + time.perf_counter() - started

    def require_finite() -> None:
        # Sums and averages, so that no bad step in between is missed.
        averaged = [tensor for tensor in ema_model.state_dict().values() if tensor.is_floating_point()]
        if not math.isfinite((loss_sum.sum() + nn.utils.get_total_norm(averaged)).item()):
            raise TrainingError(
                f"the loss or a weight is no longer finite in epoch {epoch + 1} before step {step}: try a smaller --lr "
                f"than {config.lr:g}, or --precision float32; the checkpoints in {output_dir} are as they were"
            )

    def write(function: Callable[..., None], *values: Any, **options: Any) -> None:
        """Call what writes into the folder, and again if the folder is removed meanwhile."""
        if not output_dir.is_dir():
            print(f"train.py: {output_dir} was removed; making it anew", file=sys.stderr, flush=True)
            output_dir.mkdir(parents=True, exist_ok=True)
            take(output_dir)  # the one that was taken is no more; this one is for as long as the process lives
        try:
            function(*values, **options)
        except OSError as error:
            if not output_dir.is_dir():
                return write(function, *values, **options)
            what_next = "go on with --resume: what was saved is whole" if last_path.exists() else "start again"
            raise TrainingError(f"{error}, then {what_next}") from error

    def save(path: Path, **training: Any) -> None:
        nonlocal run_saved
        if not run_saved:  # what lies here may be hours of somebody's work: it is put aside before the first save
            put_aside(output_dir)
            run_saved = True
        write(
            save_checkpoint,
            path,
            ema_model,
            train_config=vars(config),
            epoch=len(history),
            val_accuracy=history[-1]["val_accuracy"] if history else None,
            history=history,
            environment=f"torch {torch.__version__}, {platform.machine()}, {device.type}, {precision}, "
            f"{torch.get_num_threads()} CPU threads",
            **training,
        )

    def save_position() -> None:
        save(
            last_path,
            training=dict(
                model=dict(model.state_dict()),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                generator=generator.get_state(),
                rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state() if device.type == "cuda" else None,
                processes=world_size,
                epoch=epoch,
                step=step,
                order=order if step else None,
                predictions=predictions[: step * config.batch_size].clone() if step else None,
                loss_sum=loss_sum,
                best_epoch=best_epoch,
                best_accuracy=best_accuracy,
                seconds=elapsed(),
            ),
        )

    def gather() -> None:
        """Bring the epoch's losses and predictions of all processes together in each of them."""
        if world_size > 1:
            dist.all_reduce(loss_sum)
            dist.all_reduce(predictions, dist.ReduceOp.MAX)  # a process has 0 where others predict

    def stop_requested() -> bool:
        """Whether any process was told to stop, the same answer in all of them."""
        if world_size > 1:
            requested = torch.tensor(stop.requested, device=device)
            dist.all_reduce(requested, dist.ReduceOp.MAX)
            agreed = int(requested)
            stop.requested = stop.requested or agreed  # a signal that arrived meanwhile counts the next time
            return bool(agreed)
        return bool(stop.requested)

    def leave(message: str) -> None:
        if world_size > 1:
            dist.barrier()  # torchrun ends all processes as soon as one has left: the first must have saved
        stop.leave(message, output_dir, world_size if rank == 0 else 0)

    if rank == 0 and epoch and epoch == best_epoch and not step:  # killed before this could be saved, maybe
        save(best_path)

    stop = StopSignal()
    while epoch < config.epochs:
        # One epoch: a permutation of the training images, cut into batches.
        title = f"epoch {epoch + 1}/{config.epochs}"
        epoch_started, epoch_first_step = time.perf_counter(), step
        model.train()
        if step == 0:
            # Every process draws the same order and the same augmentation, and takes its share of the result.
            order = train_index[torch.randperm(len(train_index), generator=generator, device=device)][:epoch_images]
            loss_sum, predictions = torch.zeros(world_size, device=device), torch.zeros_like(order)
        bar = tqdm(
            total=len(order),
            initial=step * config.batch_size,
            desc=title,
            unit=" images",
            disable=config.quiet or rank > 0,
            mininterval=0.5,
            leave=False,
        )
        with bar:
            while step < steps_per_epoch:
                index = order[step * config.batch_size : (step + 1) * config.batch_size]
                lr = learning_rate(epoch * steps_per_epoch + step, total_steps, warmup_steps, config.lr)
                x = dataset.normalize(
                    dataset.augment(images[index], generator, config.flip, config.shift, config.erase)
                )
                share = slice(rank, None, world_size)
                loss, logits = training_loss(forward, teachers, x[share], labels[index][share], precision, config)
                # Weighted so that the mean over the processes, of unlike numbers of images, is that of the batch.
                loss = loss * (len(logits) * world_size / len(index))
                loss.backward()
                take_step(model, ema_model, optimizers, lr, epoch * steps_per_epoch + step, config)

                loss_sum[rank] += loss.detach() * (len(index) / world_size)
                predictions[step * config.batch_size :][: len(index)][share] = logits.detach().argmax(dim=1)
                step += 1
                bar.update(len(index))
                # Looking at a value makes a GPU wait, and processes wait for each other, so this is done seldom, and
                # always before anything is saved.
                if step % 20 == 0 or step == steps_per_epoch or (stop.requested and world_size == 1):
                    require_finite()
                    bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.3g}")
                    if stop_requested() and step < steps_per_epoch:
                        gather()
                        if rank == 0:
                            save_position()
                        leave(f"stopped in epoch {epoch + 1} after step {step}")

        # The end of the epoch: reports, history, checkpoints.
        train_seconds = time.perf_counter() - epoch_started
        gather()
        epoch, step = epoch + 1, 0
        if rank == 0:
            row = dict(
                epoch=epoch,
                lr=lr,
                train_loss=loss_sum.sum().item() / len(order),
                train_accuracy=accuracy_score(labels[order].cpu(), predictions.cpu()),
                val_loss=math.nan,
                val_accuracy=math.nan,
                seconds=elapsed(),
            )
            if not config.quiet:
                print(f"\n{title}, training images as augmented\n{report(labels[order], predictions)}")
            if len(val_index):
                logits = predict(ema_model, val_images)
                row["val_loss"] = F.cross_entropy(logits, val_labels).item()
                row["val_accuracy"] = accuracy_score(val_labels.cpu(), logits.argmax(dim=1).cpu())
                if not config.quiet:
                    print(f"{title}, validation split\n{report(val_labels, logits.argmax(dim=1))}")
            if config.report_test:
                logits = predict(ema_model, test_images)
                row["test_loss"] = F.cross_entropy(logits, test_labels).item()
                row["test_accuracy"] = accuracy_score(test_labels.cpu(), logits.argmax(dim=1).cpu())
                if not config.quiet:
                    print(f"{title}, test split\n{report(test_labels, logits.argmax(dim=1))}")
            history.append(row)
            steps_done = epoch * steps_per_epoch
            remaining = (time.perf_counter() - started) / (steps_done - first_step) * (total_steps - steps_done)
            # The file may be gone, with its folder: then this epoch is the best there is.
            is_best = not len(val_index) or row["val_accuracy"] > best_accuracy or not best_path.exists()
            line = (
                f"{title}  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.4f}  "
                f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.4f}  lr {lr:.3g}  "
                f"{(len(order) - epoch_first_step * config.batch_size) / train_seconds:.0f} images/s  "
                f"elapsed {clock(elapsed())}  remaining {clock(remaining)}"
            )
            separator = "  " if config.quiet else "\n"  # quiet is one line an epoch, whatever there is to say
            if config.report_test:
                line += f"{separator}test accuracy {row['test_accuracy']:.4f}, which chooses nothing"
            if is_best:
                line += f"{separator}saved {best_path}: "
                line += (
                    "best validation accuracy so far" if len(val_index) else "no validation split, the latest weights"
                )
                best_epoch, best_accuracy = epoch, row["val_accuracy"] if len(val_index) else best_accuracy
            save_position()  # first: from it, a run that is killed before the next line can save the best one again
            if is_best:
                save(best_path)
            print(line, flush=True)
            write(write_history, history, output_dir / "history.csv")
        if stop_requested():
            leave(f"stopped after epoch {epoch}")
    stop.restore()
    if is_one_of_several():
        del forward  # the last to let go of gloo must not be DistributedDataParallel, which then waits for ever
        dist.destroy_process_group()

    if rank == 0:  # the best checkpoint gets the whole history, so that --evaluate can draw it at any time
        if not last_path.exists():  # removed with its folder: the latest weights are there still
            save_position()
        if not best_path.exists():
            save(best_path)
        ema_model, best = load_checkpoint(best_path)
        contents = {k: v for k, v in best.items() if k not in ("format", "version", "model_config", "model", "history")}
        write(save_checkpoint, best_path, ema_model, **contents, history=history)
        write(write_history, history, output_dir / "history.csv")  # of a run that was killed before it
    return best_path


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours between two steps; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = 0
        self.before = {kind: signal.signal(kind, self.request) for kind in (signal.SIGINT, signal.SIGTERM)}

    def request(self, number: int, frame: Any) -> None:
        self.requested = number
        if not is_one_of_several():  # torchrun passes signals on, so that one may arrive twice
            self.restore()

    def restore(self) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def leave(self, message: str, output_dir: Path, processes: int) -> None:
        """End this process; tell how to go on with so many of them, unless that is another one's to tell (0)."""
        where = "" if output_dir == Path(DEFAULTS["output_dir"][0]) else f" --output-dir {shlex.quote(str(output_dir))}"
        if processes:
            launcher = f"torchrun --nproc-per-node={processes}" if processes > 1 else "python"
            print(f"\n{message}; go on with: {launcher} train.py --resume{where}", flush=True)
        raise SystemExit(128 + self.requested)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves beside its checkpoint


def take(output_dir: Path) -> int | None:
    """Keep other runs out of a folder until the handle that this returns is closed, or the process ends.

    Raises:
        TrainingError: another run has it.
    """
    if os.name == "nt":  # which opens no folders
        return None
    folder = os.open(output_dir, os.O_RDONLY)
    if dataset.lock(folder) is False:
        os.close(folder)
        raise TrainingError(f"another run is writing to {output_dir}: give this one another --output-dir")
    return folder


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Make the folder of a run, see that files can be written there, and keep other runs out of it meanwhile.

    Raises:
        TrainingError: another run has it, or nothing can be written there.
    """
    folder, made = None, []
    try:
        try:
            new = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
            output_dir.mkdir(parents=True, exist_ok=True)
            folder, made = take(output_dir), new
            with tempfile.TemporaryFile(dir=output_dir) as file:
                file.write(bytes(1 << 16))  # better now than after an epoch
        except OSError as error:
            problem = f"cannot write to {output_dir}: {error.strerror}"
            raise TrainingError(f"{problem}; choose another folder with --output-dir") from error
        yield
    finally:
        with suppress(OSError):  # empty still, if the run was refused: rmdir takes no other
            for path in made:
                path.rmdir()
        if folder is not None:
            os.close(folder)


def put_aside(output_dir: Path) -> None:
    """Rename what an earlier run left in the folder to previous-1-best.pt and so on; nothing is overwritten."""
    # last.pt first: if this is interrupted, no run can be resumed whose best.pt is elsewhere.
    names = ("last.pt", "best.pt", "history.csv", "curves.png", "confusion_matrix.png")
    earlier = [path for name in names if (path := output_dir / name).exists()]
    number = next(n for n in itertools.count(1) if not any(output_dir.glob(f"previous-{n}-*")))
    for path in earlier:
        os.replace(path, path.with_name(f"previous-{number}-{path.name}"))
    if earlier:
        print(f"an earlier run's {', '.join(path.name for path in earlier)} are now {output_dir}/previous-{number}-*")


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write a table with a row an epoch; the old file is replaced whole."""
    names = dict.fromkeys(name for row in history for name in row)  # test columns may come and go on --resume
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(names), restval="")
    writer.writeheader()
    writer.writerows(history)
    with dataset.whole_file(path) as file:
        file.write(text.getvalue().encode())


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs."""
    from matplotlib.figure import Figure  # here, since training itself needs no matplotlib

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, lr = figure.subplots(1, 3)
    for split, label in (("train", "training (as augmented)"), ("val", "validation"), ("test", "test")):
        if any(not math.isnan(row.get(f"{split}_loss", math.nan)) for row in history):
            loss.plot(epochs, [row.get(f"{split}_loss", math.nan) for row in history], ".-", label=label)
            accuracy.plot(epochs, [100 * row.get(f"{split}_accuracy", math.nan) for row in history], ".-", label=label)
    lr.plot(epochs, [row["lr"] for row in history], ".-", color="tab:green")
    for axes, title in ((loss, "loss"), (accuracy, "accuracy (%)"), (lr, "learning rate at the end of the epoch")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    loss.legend()
    accuracy.legend()
    with dataset.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, path: Path) -> None:
    """Draw how many test images of each class (rows) were taken for each class (columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        labels.cpu(),
        predictions.cpu(),
        display_labels=dataset.CLASS_NAMES,
        cmap="Blues",
        colorbar=False,
        xticks_rotation=45,
        ax=axes,
    )
    axes.set_title(f"test split: {accuracy_score(labels.cpu(), predictions.cpu()):.2%} right")
    with dataset.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def evaluate(path: Path, data_dir: str, device: torch.device) -> float:
    """Evaluate a checkpoint once on the test split; print the report, write history and pictures beside the checkpoint.

    Returns:
        The test accuracy, 0 to 1.

    Raises:
        CheckpointError, dataset.DataError, OSError: see there.
    """
    model, checkpoint = load_checkpoint(path, device)
    images, labels = (tensor.to(device) for tensor in dataset.load(data_dir, train=False))
    logits = predict(model, images)
    if not logits.isfinite().all():
        raise CheckpointError(f"{path} gives answers that are not finite: train again or use another one")
    predictions = logits.argmax(dim=1)
    accuracy = accuracy_score(labels.cpu(), predictions.cpu())
    print(f"\n{path} (epoch {checkpoint.get('epoch')}) on the test split\n{report(labels, predictions)}")
    print(
        f"test accuracy {accuracy:.4f}, loss {F.cross_entropy(logits, labels).item():.4f}, "
        f"{model.num_parameters():,} parameters, {len(labels):,} images, one forward pass each"
    )
    mirrored = (logits.softmax(dim=1) + predict(model, images.flip(3)).softmax(dim=1)).argmax(dim=1)
    print(f"averaged with the mirror image's answer: {accuracy_score(labels.cpu(), mirrored.cpu()):.4f}")
    aside = re.match(r"previous-\d+-", path.name)  # an earlier run's, see put_aside
    matrix, curves, table = (
        path.with_name(f"{aside[0] if aside else ''}{name}")
        for name in ("confusion_matrix.png", "curves.png", "history.csv")
    )
    plot_confusion_matrix(labels, predictions, matrix)
    written = [matrix]
    if checkpoint.get("history"):
        plot_curves(checkpoint["history"], curves)
        written.append(curves)
        if not table.exists():  # a run's own may have more epochs than its best checkpoint
            write_history(checkpoint["history"], table)
            written.append(table)
    print(f"wrote {', '.join(file.name for file in written)} to {path.parent}")
    return accuracy


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def number(name: str) -> Callable[[str], float]:
    """A parser of a number within its range, for argparse."""
    kind = type(RANGES[name][0])

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if problem := complaint(name, value):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return value

    return parse


def parse_flags(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line; the result holds only the flags that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without a page of usage
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --output-dir")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="evaluate on the test split, train nothing")
    for name, (value, text) in DEFAULTS.items():
        options: dict[str, Any] = dict(dest=name, help=f"{text} (default: {value})")
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif name == "teacher":
            options |= dict(nargs="*", metavar="CHECKPOINT")
        elif isinstance(value, tuple | list):
            options |= dict(type=number(name), nargs=len(value), metavar="N")
        elif name in RANGES:
            options |= dict(type=number(name), metavar="N" if type(RANGES[name][0]) is int else "X")
        elif name in CHOICES:
            options["choices"] = CHOICES[name]
        else:
            options["metavar"] = "PATH"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args(arguments)
    for name, value in vars(args).items():
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
    return parser, args


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Every name of `DEFAULTS` with its value: the one given, else the recipe's, else the default.

    Raises:
        TrainingError: there is no such recipe, or it sets what is no default.
    """
    defaults = {name: value for name, (value, _) in DEFAULTS.items()}
    recipe = given.get("recipe", defaults["recipe"])
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise TrainingError(f"--recipe {recipe!r} is unknown: give one of {', '.join(RECIPES)}")
    if unknown := RECIPES[recipe].keys() - DEFAULTS.keys():
        raise TrainingError(
            f"the recipe {recipe} sets {', '.join(sorted(unknown))}, which is no default: mend the name"
        )
    return defaults | RECIPES[recipe] | given


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may have letters that this terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    parser, args = parse_flags()
    given = vars(args)
    set_threads()
    resume, checkpoint_to_evaluate = given.pop("resume", False), given.pop("evaluate", None)
    if resume and checkpoint_to_evaluate is not None:
        parser.error("--resume trains and --evaluate does not: give one of them")
    try:
        settings = choose_settings(given)
        if resume:  # the run's own settings count, whatever the defaults have become since
            path = Path(settings["output_dir"]) / "last.pt"
            saved = load_checkpoint(path)[1]
            if type(saved.get("training")) is not dict or set(saved.get("train_config", ())) != set(DEFAULTS):
                raise CheckpointError(f"{path} holds no run that this version can resume: start anew without --resume")
            check_settings(saved["train_config"] | {"output_dir": settings["output_dir"]})
            for name in DEFAULTS:
                if name in given and name not in NOT_OF_THE_RUN and given[name] != saved["train_config"][name]:
                    parser.error(
                        f"--{name.replace('_', '-')} {given[name]} differs from the run to resume, which has "
                        f"{saved['train_config'][name]}: leave the flag out, or start anew without --resume"
                    )
                if name not in given and name != "output_dir":
                    settings[name] = saved["train_config"][name]
            if "data_dir" not in given and not Path(settings["data_dir"]).is_dir():
                parser.error(f"the run's data folder {settings['data_dir']!r} is not here: give --data-dir")
        config = SimpleNamespace(**settings)
        is_first = not is_one_of_several() or os.environ["RANK"] == "0"  # one of them is enough to evaluate
        if checkpoint_to_evaluate is not None:
            if is_first:
                evaluate(Path(checkpoint_to_evaluate), config.data_dir, choose_device(config.device))
            return
        check_settings(settings)
        with claim(Path(config.output_dir)) if is_first else nullcontext():
            trained = train(config, resume)
            if is_first:
                print(f"\nheatmaps of this model: python Visulization.py --checkpoint {trained}")
                evaluate(trained, config.data_dir, choose_device(config.device))
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (TrainingError, CheckpointError, dataset.DataError, ValueError, OSError) as error:
        raise SystemExit(f"train.py: error: {dataset.one_line(error)}") from None
    except MemoryError:
        raise SystemExit("train.py: error: not enough memory: give a smaller --batch-size or model") from None
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).splitlines()[0][:300]
            advice = "install a C++ compiler, or train with --no-compile"
            raise SystemExit(f"train.py: error: --compile does not work here ({reason}): {advice}") from None
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise SystemExit("train.py: error: not enough memory: give a smaller --batch-size or model") from None
        lost = is_one_of_several() and ("gloo" in str(error) or isinstance(error, dist.DistError))
        if not lost:
            raise
        reason = str(error).splitlines()[0]
        raise SystemExit(f"train.py: error: process {os.environ['RANK']} lost another one: {reason}") from None


if __name__ == "__main__":
    main()
