"""Train the CNN + Transformer hybrid on Fashion-MNIST.

    python train.py                                  train with the defaults below, then test once
    python train.py --recipe fast                    minutes on two CPU cores
    python train.py --recipe record --compile        the most accurate, on a GPU; first its teacher
    python train.py --epochs 5 --lr 1e-3             every default is also a flag; --help lists them
    python train.py --resume                         go on with an interrupted run
    torchrun --nproc-per-node=2 train.py             in two processes, on GPUs or CPU cores
    python train.py --evaluate checkpoints/best.pt   test a checkpoint, train nothing

The best epoch by validation accuracy, or the last one without a validation split, is kept as
`checkpoints/best.pt`, the state of the run as `checkpoints/last.pt`. The test split is evaluated
once, at the end, and chooses nothing.
"""

from common.console import outlive_output, prepare

if __name__ == "__main__":
    prepare("train.py")

import copy
import os
import random
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import dataset
from common.files import UserError, checksum, errors_in_one_line, printable
from model import MAX_PARAMETERS, HybridClassifier, ModelConfig, load_checkpoint
from training import processes, report, runs
from training.optim import (
    check_optimizers,
    learning_rate,
    make_optimizers,
    start_up_decay,
    take_step,
    whiten_first_layer,
)
from training.replay import ReplayedStep
from training.runs import Run
from training.settings import INF, Table, choose_settings, flag, make_parser, resumed_settings

# ---- The defaults: edit a value here, or pass it as a flag (--stem-dims for stem_dims) -----------

# name=(default, what is allowed: a range, words or anything (None), meaning)
# A row that you add is `config.NAME`.
SETTINGS: Table = dict(
    recipe=("default", None, "default, fast, teacher or record: values that go together"),
    # data
    data_dir=("data", None, "folder with the four files of Fashion-MNIST, or where to fetch them"),
    val_size=(5000, (0, INF), "images held out of the 60,000 to choose the best epoch; 0: none"),
    train_size=(0, (0, INF), "train on only this many of the other images, for a try; 0: on all"),
    skip_easy=(0.0, (0.0, 1.0), "pruned share of the 60 % lowest-loss images, from epoch 2 on"),
    # augmentation
    flip=(True, None, "mirror half of the images"),
    alternate_flip=(False, None, "flip each image in every other epoch instead of at random"),
    shift=(2, (0, 27), "move every image by up to this many pixels each way"),
    erase=(0.25, (0.0, 1.0), "probability that a rectangle of an image is replaced by noise"),
    erase_area=(0.33, (0.02, 1.0), "the largest such rectangle, as a fraction of the image"),
    cutmix=(0.3, (0.0, 1.0), "probability that a rectangle, with its label, is another image's"),
    rotate=(0.0, (0.0, 180.0), "rotate an eighth of the images by up to this many degrees"),
    noise=(0.0, (0.0, 1.0), "add noise to an eighth, of up to this standard deviation"),
    # model
    stem_dims=((16, 32), (1, INF), "channels of the convolutional stem at 28x28 and at 14x14"),
    stem_blocks=((2, 2, 2), (0, INF), "residual blocks of the stem at 28x28, at 14x14 and at 7x7"),
    embed_dim=(96, (1, INF), "channels at 7x7, which is the width of a token"),
    depth=(1, (0, INF), "number of Transformer blocks"),
    num_heads=(3, (1, INF), "attention heads of a block; divides embed_dim"),
    mlp_ratio=(2.0, (0.01, INF), "hidden width of a block's MLP, as a multiple of embed_dim"),
    pool=("attention", ("attention", "mean"), "how 49 tokens become one"),
    drop_path=(0.0, (0.0, 0.99), "stochastic depth of the last Transformer block"),
    residual_unit=("resnet", ("resnet", "pyramidnet"), "pyramidnet: norm first, no ReLU last"),
    whiten=(False, None, "frozen PCA-whitening layer as the first one, of at most 18 filters"),
    # optimisation
    epochs=(30, (1, INF), "passes over the training images, see --skip-easy"),
    batch_size=(256, (1, INF), "images per step, of all processes together"),
    optimizer=("muon", ("muon", "adamw"), "muon: for hidden matrices and filters, with adamw"),
    lr=(8e-3, (0.0, INF), "peak learning rate"),
    muon_momentum=(0.95, (0.0, 0.999), "momentum of Muon"),
    muon_steps=(5, (3, 5), "Newton-Schulz steps of Muon; 3 have other coefficients"),
    bias_lr=(1.0, (0.0, INF), "learning rate of norms' biases, as a multiple of lr"),
    identity=(False, None, "convolutions that open a stage start as identities"),
    late_batch=(0, (0, INF), "from this epoch on batches are twice as large; 0: never"),
    jitter=(0.0, (0.0, 1.0), "brightness and contrast change by up to this share"),
    freeze_from=(0, (0, INF), "from this epoch on the stem to 14x14 is frozen; 0: never"),
    lookahead=(False, None, "every five steps the weights go on from their average"),
    bn_momentum=(0.1, (0.0, 1.0), "share of the newest batch in batch norm's statistics"),
    prune_by=("last", ("last", "mean"), "prune by the last loss, or by an average of all"),
    schedule=("cosine", ("cosine", "linear"), "how the learning rate falls from there to 0"),
    warmup_epochs=(1.0, (0.0, INF), "epochs of linear warm-up, at most a quarter of the run"),
    weight_decay=(0.05, (0.0, INF), "decoupled weight decay of all matrices and filters"),
    label_smoothing=(0.0, (0.0, 0.99), "share of the target spread evenly over all classes"),
    ema_decay=(0.999, (0.0, 0.999999), "decay of the averaged weights, which are kept; 0 is off"),
    grad_clip=(1.0, (0.0, INF), "maximum gradient norm; 0 disables clipping"),
    # distillation
    teacher=((), None, "checkpoints whose mean prediction is learnt, besides the labels"),
    teacher_weight=(0.9, (0.0, 1.0), "weight of the teachers in the loss, where there are any"),
    temperature=(1.0, (0.01, INF), "softens the predictions of teachers and model"),
    # system
    seed=(0, (0, 2**32 - 1), "random seed of the split, the weights, the order, the augmentation"),
    device=("auto", ("auto", "cpu", "cuda", "mps"), "auto uses an accelerator if there is one"),
    precision=("auto", ("auto", "float32", "bfloat16"), "auto uses bfloat16 where it is faster"),
    threads=(0, (0, 1024), "CPU threads; 0: one per core, or fewer if some cores are busy"),
    compile=(False, None, "use torch.compile: a minute of compilation first, so for long runs"),
    cuda_graph=(False, None, "on one GPU, record a step and replay it without Python"),
    output_dir=("checkpoints", None, "where checkpoints, history and pictures are written"),
    report_test=(False, None, "report on the test split after every epoch too; chooses nothing"),
    quiet=(False, None, "one line an epoch: no bars, no reports"),
)
# What the record and its teacher, a model seven times as large, share.
BIG = dict(
    val_size=0,
    shift=3,
    erase=0.5,
    erase_area=0.4,
    cutmix=0.5,
    rotate=15.0,
    noise=0.1,
    residual_unit="pyramidnet",
    mlp_ratio=1.0,
    cuda_graph=True,
)
RECIPES = dict(  # values that replace the defaults above; flags override both
    default={},
    # Minutes on two CPU cores: a smaller model, too few epochs to overfit.
    fast=dict(
        val_size=0,
        skip_easy=0.95,
        alternate_flip=True,
        shift=0,
        erase=0.0,
        cutmix=0.0,
        label_smoothing=0.1,
        stem_blocks=(0, 2, 1),
        embed_dim=64,
        num_heads=1,
        mlp_ratio=1.0,
        whiten=True,
        epochs=7,
        batch_size=128,
        lr=1.6e-2,
        schedule="linear",
        warmup_epochs=0.25,
        grad_clip=0.0,
    ),
    teacher=BIG
    | dict(
        stem_dims=(32, 128),
        stem_blocks=(3, 3, 2),
        embed_dim=256,
        num_heads=8,
        epochs=64,
    ),
    # The most accurate. First: --recipe teacher --output-dir checkpoints/teacher
    record=BIG
    | dict(
        stem_dims=(32, 64),
        stem_blocks=(3, 3, 1),
        epochs=121,
        teacher=("checkpoints/teacher/best.pt",),
    ),
)
STREAMS = ("weights", "flips", "order", "steps")
# A teacher may have moved; its checksum is compared.
MAY_CHANGE_ON_RESUME = ("data_dir", "output_dir", "report_test", "quiet", "teacher")
EVALUATION_USES = ("data_dir", "device", "threads")
REFINES = dict(  # settings that change nothing where another one is off
    alternate_flip="flip",
    erase_area="erase",
    num_heads="depth",
    mlp_ratio="depth",
    drop_path="depth",
    teacher_weight="teacher",
    temperature="teacher",
)


# ---- Data ----------------------------------------------------------------------------------------


def load_data(config: SimpleNamespace, device: torch.device) -> tuple:
    """Put the data on the device, and set validation images aside.

    Returns images, uint8 (60000, 1, 28, 28), labels, int64 (60000,), the indices of those to train
    on, int64 (N,), and the images and labels of the splits to report on, "val" and "test".
    """
    images, labels = dataset.load(config.data_dir, train=True)
    test_split = dataset.load(config.data_dir, train=False)  # if it is missing, that is said now
    classes = len(dataset.CLASS_NAMES)
    left = len(labels) - config.val_size
    for name, most in (("val_size", len(labels) - classes), ("train_size", left - classes)):
        size = getattr(config, name)
        if size and not classes <= size <= most:
            raise UserError(f"{flag(name)} {size}: give 0, or {classes} to {max(most, 0):,}")
    train_index, val_index = dataset.split_indices(labels, config.val_size, config.seed)
    if config.train_size:
        some = dataset.split_indices(labels[train_index], config.train_size, config.seed)[1]
        train_index = train_index[some]
    held_out = {}
    if config.val_size:
        held_out["val"] = images[val_index].to(device), labels[val_index].to(device)
    if config.report_test:
        held_out["test"] = test_split[0].to(device), test_split[1].to(device)
    return images.to(device), labels.to(device), train_index.to(device), held_out


def augmented_batch(
    images: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
    config: SimpleNamespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random variants of uint8 images (N, 1, 28, 28), normalised, and their targets.

    The targets are the labels, int64 (N,), or with CutMix the share of each class, (N, 10).
    """
    names = ("shift", "erase", "erase_area", "rotate", "noise")
    options = {name: getattr(config, name) for name in names}
    flip = config.flip and not config.alternate_flip  # which mirrors them once an epoch
    images = dataset.augment(images, generator, flip, **options)
    if config.cutmix:
        targets = F.one_hot(labels, len(dataset.CLASS_NAMES)).float()
        images, labels = dataset.cutmix(images, targets, generator, config.cutmix)
    x = dataset.normalize(images)
    if config.jitter:
        drawn = torch.rand(2, len(x), 1, 1, 1, generator=generator, device=x.device) * 2 - 1
        x = x * (1 + config.jitter * drawn[0]) + config.jitter * drawn[1]
    return x, labels


# ---- The loss ------------------------------------------------------------------------------------


def training_loss(
    model: nn.Module,
    teachers: list[nn.Module],
    x: torch.Tensor,
    targets: torch.Tensor,
    config: SimpleNamespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy against the smoothed labels (Szegedy et al. 2016), and the teachers' part.

    That is the Kullback-Leibler divergence of the softened predictions, times temperature squared,
    so that its gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531, section 2). Teachers
    see the very same variants of the images (Beyer et al. 2022, arXiv 2106.05237).

    Takes normalised images (N, 1, 28, 28) and targets: labels, int64 (N,), or probabilities,
    (N, 10). Returns the mean loss, and logits, float32 (N, 10). Only the forward passes compute in
    `config.precision`.
    """
    is_low = config.precision == "bfloat16"
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=is_low):
        logits = model(x).float()
        with torch.no_grad():
            answers = [teacher(x).float() for teacher in teachers]
    loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    if teachers:
        t = config.temperature
        learnt = (logits / t).log_softmax(dim=1)
        taught = torch.stack([(answer / t).softmax(dim=1) for answer in answers]).mean(dim=0)
        divergence = F.kl_div(learnt, taught, reduction="batchmean")
        weight = config.teacher_weight
        loss = (1 - weight) * loss + weight * t**2 * divergence
    return loss, logits


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 100) -> torch.Tensor:
    """Logits, float32 (N, 10), of uint8 images (N, 1, 28, 28), in evaluation mode, in float32."""
    was_training = model.training
    model.eval()
    chunks = images.split(batch_size)
    logits = torch.cat([model(dataset.normalize(chunk)) for chunk in chunks])
    model.train(was_training)
    return logits


# ---- The training loop ---------------------------------------------------------------------------


def train(config: SimpleNamespace, resume: bool = False) -> Path:
    """Train, or go on from last.pt in `config.output_dir`, and return the best checkpoint's path.

    The settings are made by `choose_settings(SETTINGS, RECIPES, {...})`; to resume, they must be
    those of last.pt.
    """
    run = start_run(config, resume)
    if processes.is_first():
        print_settings(run)
    seconds_before = run.history[-1]["seconds"] if run.history else 0.0
    started = time.perf_counter()
    for epoch in range(len(run.history), run.config.epochs):
        row = train_epoch(run, epoch)
        if not processes.is_first():
            continue  # the first process reports and saves
        for split, (images, labels) in run.held_out.items():
            row |= report.summary(split, predict(run.ema, images), labels, run.config.quiet)
        row["seconds"] = round(seconds_before + time.perf_counter() - started, 2)
        runs.save_run(run, row)
        print(report.epoch_line(run.history, run.steps), flush=True)
    return run.folder / "best.pt"


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for an epoch, counted from 0, and return its row of the history.

    All randomness follows from the seed and the epoch, and that of a process from its rank, too.
    """
    config = run.config
    if config.flip and config.alternate_flip:
        run.generator.manual_seed(seed_for(config.seed, "flips"))  # the same in each epoch
        run.images.copy_(dataset.alternate_flip(run.originals, run.generator, epoch))
    run.generator.manual_seed(seed_for(config.seed, "order", epoch))  # the same in every process
    seed_everything(seed_for(config.seed, "steps", epoch, processes.rank()))
    pruned = run.pruned if epoch else 0
    order = dataset.epoch_order(run.losses[run.train_index], run.generator, pruned)
    order = order[
        : run.steps[epoch] * batch_size_of(config, epoch)
    ]
    seen = run.train_index[order]

    is_silent = config.quiet or not processes.is_first()
    batches = seen.split(batch_size_of(config, epoch))
    bar = tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=is_silent)
    outputs = []
    run.model.train()
    if config.freeze_from and epoch + 1 >= config.freeze_from:
        for name, parameter in run.model.named_parameters():
            if name.startswith(("stem.first", "stem.down1", "stem.stage0", "stem.stage1")):
                parameter.requires_grad_(False)
                parameter.grad = None
    for step, index in enumerate(bar, start=sum(run.steps[:epoch])):
        lr = learning_rate(step, sum(run.steps), run.warmup_steps, config.lr, config.schedule)
        decay = min(config.ema_decay, start_up_decay(step))
        loss, logits = run.step(index, lr, decay)
        outputs.append(logits)
        if config.lookahead and step % 5 == 4:
            progress = (step + 1) / sum(run.steps)
            look_ahead(run, 1 - 0.95**5 * progress**3)
        if step % 20 == 0:  # rarely, since it has to wait for the GPU
            bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.3g}")

    logits = processes.gather(torch.cat(outputs))
    new = F.cross_entropy(logits, run.labels[seen], reduction="none")
    if epoch and config.prune_by == "mean":
        new = (run.losses[seen] + new) / 2
    run.losses[seen] = new
    refuse_infinity(run, logits, epoch)
    row = dict(epoch=epoch + 1, lr=lr, images=len(seen))
    if processes.is_first():
        row |= report.summary("train", logits, run.labels[seen], config.quiet)
    # A number that you add to the row goes to history.csv and the checkpoints.
    return row


@torch.no_grad()
def look_ahead(run: Run, share: float) -> None:
    """Move the slow weights by a share towards the weights, and go on from them."""
    weights = list(run.model.parameters())
    if not hasattr(run, "slow"):
        run.slow = [weight.clone() for weight in weights]
    torch._foreach_lerp_(run.slow, weights, share)
    torch._foreach_copy_(weights, run.slow)


def training_step(
    run: Run, index: torch.Tensor, lr: float | torch.Tensor, decay: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on the images of these indices, int64 (N,); returns loss and logits, (N, 10).

    With several processes each takes its part of the batch.
    """
    x, y = augmented_batch(run.images[index], run.labels[index], run.generator, run.config)
    x, y = processes.own_part(x), processes.own_part(y)
    loss, logits = training_loss(run.compiled, run.teachers, x, y, run.config)
    loss.backward()
    processes.average_gradients(run.model)
    take_step(run.model, run.ema, run.optimizers, lr, decay, run.config.grad_clip)
    return loss.detach(), logits.detach()


def refuse_infinity(run: Run, logits: torch.Tensor, epoch: int) -> None:
    """End a run whose logits or averaged weights are no longer finite, before it is saved."""
    if all(tensor.isfinite().all() for tensor in (logits, *run.ema.state_dict().values())):
        return
    advice = f"lower --lr from {run.config.lr:g}"
    if run.config.precision != "float32":
        advice += ", or try --precision float32"
    what = f"the loss or a weight became infinite or NaN in epoch {epoch + 1}"
    raise UserError(f"{what}, not saved: {advice}")


def seed_for(seed: int, purpose: str, epoch: int = 0, rank: int = 0) -> int:
    """A seed of its own for each purpose of STREAMS, epoch and process, by NumPy's SeedSequence."""
    numbers = (seed, STREAMS.index(purpose), epoch, rank)
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed what draws without a generator: stochastic depth, and what a loss of your own uses."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# ---- The start of a run --------------------------------------------------------------------------


def start_run(config: SimpleNamespace, resume: bool = False, model: nn.Module | None = None) -> Run:
    """A run with its data, model, optimisers and teachers, new or where last.pt stopped.

    What the settings mean by "auto" is in its own `config`. Another model may be given.
    """
    device = processes.choose_device(config.device)
    processes.join(device)
    threads = processes.set_threads(config.threads)
    precision = processes.choose_precision(config.precision, device)
    # All processes, and a resumed run, have to compute alike.
    threads, precision = processes.of_the_first((threads, precision))
    torch.set_num_threads(threads)
    chosen = dict(device=device.type, threads=threads, precision=precision)
    config = SimpleNamespace(**vars(config) | chosen)

    images, labels, train_index, held_out = load_data(config, device)
    steps, pruned = steps_of_epochs(config, len(train_index))
    seed_everything(seed_for(config.seed, "weights"))
    model = (model or make_model(config)).to(device, memory_format=torch.channels_last)
    if config.whiten:
        whiten_first_layer(model, dataset.normalize(images[train_index[:5000]]))
    if config.identity:
        for layer in (model.stem.down1, model.stem.down2):
            weight = layer[0][0].weight
            nn.init.dirac_(weight.data[: weight.shape[1]])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.bn_momentum
    optimizers = make_optimizers(
        model,
        config.optimizer,
        config.weight_decay,
        config.muon_momentum,
        config.bias_lr,
        config.muon_steps,
    )
    check_optimizers(model, optimizers)
    run = Run(
        config=config,
        images=images,
        labels=labels,
        train_index=train_index,
        held_out=held_out,
        steps=steps,
        pruned=pruned,
        warmup_steps=round(min(config.warmup_epochs * steps[0], sum(steps) / 4)),
        model=model,
        ema=copy.deepcopy(model).eval().requires_grad_(False),
        optimizers=optimizers,
        teachers=runs.load_teachers(config, labels, device),
        teacher_checksums=[checksum(path) for path in runs.paths_of_teachers(config)],
        losses=torch.full((len(labels),), 100.0, device=device),  # unseen images are hard
        generator=torch.Generator(device),
    )
    if resume:
        runs.resume_run(run)
    if config.compile:
        networks = [torch.compile(net, dynamic=False) for net in (model, *run.teachers)]
        run.compiled, run.teachers = networks[0], networks[1:]
    run.step = partial(training_step, run)
    if config.cuda_graph and device.type == "cuda" and processes.count() == 1:
        run.step = ReplayedStep(run.step, run.generator)
    return run


def batch_size_of(config: SimpleNamespace, epoch: int) -> int:
    """The images of a step in an epoch, counted from 0."""
    is_late = config.late_batch and epoch + 1 >= config.late_batch
    return config.batch_size * (2 if is_late else 1)


def steps_of_epochs(config: SimpleNamespace, size: int) -> tuple[list[int], int]:
    """The steps of each epoch on that many images, and how many of them later epochs prune."""
    pruned = 0
    if config.epochs > 1:
        pruned = round(config.skip_easy * dataset.EASY_SHARE * size)
    sizes = [size] + [size - pruned] * (config.epochs - 1)
    steps = [n // batch_size_of(config, epoch) for epoch, n in enumerate(sizes)]
    shared = ""
    if processes.count() > 1:
        shared = f", divisible by the {processes.count()} processes"
    if not steps[-1] or config.batch_size % processes.count():
        most = f"at most {size - pruned:,}{shared}"
        raise UserError(f"--batch-size {config.batch_size}: give {most}")
    return steps, pruned


def make_model(config: SimpleNamespace) -> HybridClassifier:
    """A model of these settings; every field of `ModelConfig` is one of them."""
    names = [field.name for field in fields(ModelConfig)]
    for name in names:
        if not hasattr(config, name):
            advice = "give it a row of this name in SETTINGS of train.py"
            raise UserError(f"ModelConfig has the field {name}: {advice}")
    return HybridClassifier(ModelConfig(**{name: getattr(config, name) for name in names}))


def print_settings(run: Run) -> None:
    """Print every setting of a run, its size, and what a person may not expect."""
    for name, value in vars(run.config).items():
        print(f"{name:16} {printable(value)}")
    parameters, images = run.model.num_parameters(), len(run.train_index)
    print(f"\n{parameters:,} parameters, {images:,} training images", end=", ")
    print(f"processes: {processes.count()}")
    if parameters > MAX_PARAMETERS:
        print(f"note: this project allows itself at most {MAX_PARAMETERS:,} parameters")
    limit = start_up_decay(sum(run.steps) - 1)
    if limit < run.config.ema_decay:
        what = f"an --ema-decay above {limit:.4f} changes nothing"
        print(f"note: in a run of {sum(run.steps):,} steps {what}: the average starts short")


# ---- The command line ----------------------------------------------------------------------------


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: no half-written file
    parser = make_parser(SETTINGS, __doc__.splitlines()[0])
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with the run in --output-dir, or start one")
    add("--evaluate", metavar="CHECKPOINT", help="evaluate on the test split, train nothing")
    given = vars(parser.parse_args())
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    with errors_in_one_line("train.py"), outlive_output("train.py"):
        if "evaluate" in given:
            evaluate_command(given)
        else:
            train_command(given, resume=given.pop("resume", False))


def train_command(given: dict[str, Any], resume: bool) -> None:
    """Train, or go on with the run in the folder, then test."""
    is_first = processes.is_first()
    folder = Path(os.path.expanduser(given.get("output_dir", SETTINGS["output_dir"][0])))
    if resume and not (folder / "last.pt").exists():
        resume = False
        if is_first:
            print(f"there is no run to resume in {folder}: starting one")
    resume = resume or (processes.is_restart() and runs.has_saved(folder))
    if resume:
        given.setdefault("output_dir", SETTINGS["output_dir"][0])  # it may have been moved
        saved = runs.load_run(folder)["train_config"]
        given = resumed_settings(SETTINGS, saved, given, MAY_CHANGE_ON_RESUME)
    config = choose_settings(SETTINGS, RECIPES, given)
    if is_first and not resume:
        print_useless(given, config)
    with runs.reserve_folder(folder) if is_first else nullcontext():
        try:
            best = train(config, resume)
        except (KeyboardInterrupt, SystemExit):
            if is_first:
                print(f"\nstopping; {runs.advice_to_resume(folder, resume)}", flush=True)
            raise
    if is_first:
        evaluate(best, config.data_dir, processes.choose_device(config.device))
        command = f"python Visulization.py --checkpoint {shlex.quote(str(best))}"
        if config.data_dir != SETTINGS["data_dir"][0]:
            command += f" --data-dir {shlex.quote(config.data_dir)}"
        print(f"heatmaps: {command}")


def print_useless(given: dict[str, Any], config: SimpleNamespace) -> None:
    """Say which of the flags change nothing, since what they refine is off."""
    for name, other in REFINES.items():
        if name in given and not getattr(config, other):
            print(f"note: {flag(name)} changes nothing without {flag(other)}")


def evaluate_command(given: dict[str, Any]) -> None:
    """Test the checkpoint of `--evaluate`; other flags are refused."""
    checkpoint = given.pop("evaluate")
    if unused := [flag(name) for name in given if name not in EVALUATION_USES]:
        raise UserError(f"--evaluate does not use {', '.join(unused)}: leave it out")
    config = choose_settings(SETTINGS, RECIPES, given)
    processes.set_threads(config.threads)
    if processes.is_first():
        evaluate(checkpoint, config.data_dir, processes.choose_device(config.device))


def evaluate(path: str | Path, data_dir: str, device: torch.device) -> float:
    """Test a checkpoint: print the report, and draw curves and confusion matrix beside it.

    Returns the accuracy, 0 to 1.
    """
    path = Path(os.path.expanduser(path))
    model, checkpoint = load_checkpoint(path, device)
    images, labels = (tensor.to(device) for tensor in dataset.load(data_dir, train=False))
    print(f"\n{printable(path)} (epoch {checkpoint.get('epoch', 'unknown')})")
    logits = predict(model, images)
    row = report.summary("test", logits, labels, quiet=False)
    print(f"test accuracy {row['test_accuracy']:.4f}, loss {row['test_loss']:.4f}", end=", ")
    print(f"{model.num_parameters():,} parameters", end=", ")
    print(f"{len(labels):,} images, one forward pass each")
    try:
        report.save_pictures(path, checkpoint.get("history"), labels, logits.argmax(dim=1))
    except UserError as error:  # the folder may be read-only
        print(f"note: no pictures: {error}")
    return row["test_accuracy"]


if __name__ == "__main__":
    main()
