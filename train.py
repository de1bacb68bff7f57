"""Train the CNN + Transformer hybrid on Fashion-MNIST.

    python train.py                                  train with the defaults, then test once
    python train.py --recipe fast                    minutes on two CPU cores
    python train.py --resume                         go on with an interrupted run
    python train.py --evaluate checkpoints/best.pt   test a checkpoint, train nothing

The epoch of the highest validation accuracy, or else the last one, is kept in
`checkpoints/best.pt`. The test split chooses nothing.
"""

from common.console import command, outlive_output, prepare

if __name__ == "__main__":
    prepare("train.py")

import random
import signal
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from pprint import pprint
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dataset
from common.files import UserError, errors_in_one_line, printable, user_path
from dataset import FASHION_MNIST, DataInfo
from model import HybridClassifier, ModelConfig, check_classes, load_checkpoint, predict
from training import processes, report, runs
from training.optim import (
    check_optimizers,
    learning_rate,
    make_optimizers,
    take_step,
    whiten_first_layer,
)
from training.runs import Run
from training.settings import INF, Table, choose_settings, flag, make_parser, resumed_settings

# ---- The defaults: edit a value here, or pass it as a flag (--stem-dims for stem_dims) ----

# name=(default, what is allowed: a range, words or None for anything, meaning)
SETTINGS: Table = dict(
    recipe=("default", None, "values for many of the others"),
    # data
    data_dir=("data", None, "folder of Fashion-MNIST, which is fetched, or of other data"),
    val_size=(5000, (0, INF), "images held out to choose the best epoch; 0: none"),
    train_size=(0, (0, INF), "train on only this many of the others; 0: on all"),
    skip_easy=(0.95, (0.0, 1.0), "pruned share of the easiest 60 % of images after epoch 1"),
    # augmentation
    flip=(True, None, "mirror half of the images"),
    alternate_flip=(True, None, "mirror each image in every other epoch, not at random"),
    shift=(2, (0, 27), "move an image by up to this many pixels each way"),
    erase=(0.2, (0.0, 1.0), "probability that a rectangle is replaced by noise"),
    erase_area=(0.33, (0.02, 1.0), "largest part to be erased"),
    cutmix=(0.2, (0.0, 1.0), "probability that a rectangle is another image's, with its label"),
    rotate=(0.0, (0.0, 180.0), "rotate an eighth of the images by up to this many degrees"),
    noise=(0.0, (0.0, 1.0), "add noise to an eighth, up to this deviation (1: white)"),
    stretch=(1.0, (1.0, 10.0), "make garments up to this many times wider or narrower"),
    # model
    start=("", None, "checkpoint whose weights training starts from"),
    stem_dims=((16, 32), (1, INF), "channels of the stem at 28x28 and at 14x14"),
    stem_blocks=((1, 2, 2), (0, INF), "residual blocks at 28x28, at 14x14 and at 7x7"),
    embed_dim=(96, (1, INF), "channels at 7x7: the width of a token"),
    depth=(1, (0, INF), "number of Transformer blocks"),
    num_heads=(1, (1, INF), "attention heads; divides embed_dim"),
    mlp_ratio=(1.0, (0.01, INF), "hidden width of an MLP, as a multiple of embed_dim"),
    pool=("attention", ("attention", "mean"), "how 49 tokens become one"),
    drop_path=(0.0, (0.0, 0.99), "stochastic depth of the last Transformer block"),
    residual_unit=("resnet", ("resnet", "pyramidnet"), "pyramidnet: norm first, no ReLU last"),
    whiten=(True, None, "frozen first layer: 18 filters that whiten, others random"),
    # optimisation
    epochs=(33, (1, INF), "passes over the training images"),
    batch_size=(256, (1, INF), "images per step of all processes"),
    optimizer=("muon", ("muon", "adamw"), "muon: for hidden matrices and filters, with adamw"),
    lr=(8e-3, (0.0, INF), "peak learning rate"),
    momentum=(0.9, (0.0, 0.999), "of Muon"),
    schedule=("cosine", ("cosine", "linear"), "how the learning rate falls to 0"),
    warmup_epochs=(1.0, (0.0, INF), "linear warm-up, at most a quarter of the run"),
    weight_decay=(0.15, (0.0, INF), "decoupled decay of matrices and filters"),
    label_smoothing=(0.0, (0.0, 0.99), "share of the target spread over all classes"),
    ema_decay=(0.999, (0.0, 0.999999), "decay of the averaged weights; 0: no average"),
    grad_clip=(1.0, (0.0, INF), "maximum gradient norm; 0 disables clipping"),
    # distillation
    teacher=((), None, "checkpoints whose mean prediction is learnt, too"),
    teacher_weight=(0.9, (0.0, 1.0), "weight of the teachers in the loss"),
    temperature=(1.0, (0.01, INF), "softens both predictions"),
    # system
    seed=(0, (0, 2**32 - 1), "seed of split, weights, order and augmentation"),
    device=("auto", ("auto", "cpu", "cuda", "mps"), "auto: an accelerator if any"),
    precision=("auto", ("auto", "float32", "bfloat16"), "auto: bfloat16 where it is faster"),
    threads=(0, (0, 1024), "CPU threads; 0: one per idle core"),
    compile=(False, None, "use torch.compile, for long runs"),
    output_dir=("checkpoints", None, "where checkpoints, history and pictures go"),
    quiet=(False, None, "one line an epoch, and the result"),
)
# What the record, its teacher and `photographs` share.
BIG = dict(
    val_size=0,
    skip_easy=0.0,
    alternate_flip=False,
    shift=3,
    erase=0.5,
    erase_area=0.4,
    cutmix=0.5,
    rotate=15.0,
    noise=0.1,
    stem_dims=(32, 64),
    stem_blocks=(3, 3, 1),
    num_heads=3,
    residual_unit="pyramidnet",
    whiten=False,
    momentum=0.95,
    weight_decay=0.05,
)
RECIPES = dict(  # they replace defaults; flags override both
    default={},
    # Minutes on two CPU cores.
    fast=dict(
        val_size=0,
        shift=0,
        erase=0.0,
        cutmix=0.0,
        label_smoothing=0.1,
        stem_blocks=(0, 2, 1),
        embed_dim=64,
        epochs=5,
        batch_size=128,
        lr=1.6e-2,
        schedule="linear",
        warmup_epochs=0.25,
        weight_decay=0.05,
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
    record=BIG | dict(epochs=121, teacher=("checkpoints/teacher/best.pt",)),
    # The record learns people's own pictures. First: python -m explaining.photographs CLONE
    photographs=BIG
    | dict(
        data_dir="data/photographs",
        stretch=1.4,
        start="checkpoints/shipped/model.pt",
        epochs=4,
        batch_size=128,
        lr=2e-3,
        ema_decay=0.98,
    ),
)
GROUPS = dict(  # of --help, by first row
    data_dir="data",
    flip="augmentation",
    start="model",
    epochs="optimisation",
    teacher="distillation",
    seed="system",
)
MAY_CHANGE_ON_RESUME = ("data_dir", "output_dir", "quiet", "teacher")


# ---- Data ----


def read_picture(path: Path) -> np.ndarray | None:
    """A picture of your own data, uint8 (28, 28); None if it cannot be read."""
    from explaining.photo import image_of  # OpenCV may be missing

    return image_of(path)


def load_data(config: SimpleNamespace, device: torch.device) -> tuple[Tensor, ...]:
    """Put the training images on the device, and hold some out for validation.

    Returns images, labels, train_index and val_index, see `Run`.
    """
    class_list = user_path(config.data_dir) / dataset.CLASS_LIST
    if config.recipe == "photographs" and not class_list.exists():  # or Fashion-MNIST is fetched
        advice = "make the folder by python -m explaining.photographs CLONE"
        raise UserError(f"there is no {class_list}: {advice}")
    read = partial(dataset.load, config.data_dir, read_image=read_picture)
    images, labels = (part.to(device) for part in read(train=True))
    read(train=False)  # if it is missing, that is said now
    left, classes = len(labels), len(dataset.class_names(config.data_dir))
    for name in ("val_size", "train_size"):
        size = getattr(config, name)
        if size and not classes <= size <= left - classes:
            raise UserError(f"{flag(name)} {size}: give 0, or {classes} to {left - classes:,}")
        left -= size
    train_index, val_index = dataset.split_indices(
        labels, config.val_size, config.seed, config.train_size
    )
    return images, labels, train_index.to(device), val_index.to(device)


def augmented_batch(run: Run, index: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised random variants of the images of these indices, int64 (N,), and their targets.

    These are the labels, int64 (N,), or with CutMix the share of each class, (N, 10).
    """
    config = run.config
    images, targets = run.images[index], run.labels[index]
    images = dataset.augment(images, run.generator, config)
    if config.cutmix:
        targets = F.one_hot(targets, len(run.data.class_names)).float()
        images, targets = dataset.cutmix(images, targets, run.generator, config.cutmix)
    return dataset.normalize(images, run.data), targets


# ---- The loss ----


def training_loss(
    model: nn.Module, teachers: list[nn.Module], x: Tensor, targets: Tensor, config: SimpleNamespace
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with label smoothing (Szegedy et al. 2016), and distillation.

    That is the Kullback-Leibler divergence from the teachers' mean softened prediction, times
    temperature squared (Hinton et al. 2015, arXiv 1503.02531). Teachers see the same variants of
    the images (Beyer et al. 2022, arXiv 2106.05237).

    Takes what `augmented_batch` makes. Returns the mean loss, and logits, float32 (N, 10).
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


# ---- The training loop ----


def train(config: SimpleNamespace, resume: bool = False) -> Path:
    """Train, or go on from last.pt in `config.output_dir`; returns the path of best.pt."""
    run = start_run(config, resume)
    if processes.is_first() and not config.quiet:
        pprint(vars(run.config), sort_dicts=False)
        print(f"{run.model.num_parameters():,} parameters", end=", ")
        print(f"{len(run.train_index):,} training images, processes: {processes.count()}")
    started = time.perf_counter()
    if run.history:
        started -= run.history[-1]["seconds"]
    for epoch in range(len(run.history), config.epochs):
        row = train_epoch(run, epoch)
        if not processes.is_first():
            continue  # the first process reports and saves
        if config.val_size:
            images, labels = run.originals[run.val_index], run.labels[run.val_index]
            logits = predict(run.ema, images, run.data)
            row |= report.summary("val", logits, labels, run.data.class_names, config.quiet)
        row["seconds"] = round(time.perf_counter() - started, 2)
        runs.save_run(run, row)
        print(report.epoch_line(run.history, run.steps), flush=True)
    return run.folder / "best.pt"


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for an epoch, counted from 0; returns its row of the history.

    All randomness follows from the seed, the epoch and the process.
    """
    config = run.config
    if config.flip and config.alternate_flip:
        run.generator.manual_seed(seed_for(config.seed, "flips"))  # the same in every epoch
        run.images.copy_(dataset.alternate_flip(run.originals, run.generator, epoch))
    run.generator.manual_seed(seed_for(config.seed, "batches", epoch))  # the same in all processes
    seed_everything(seed_for(config.seed, "layers", epoch, processes.rank()))
    pruned = run.pruned if epoch else 0
    order = dataset.epoch_order(run.losses[run.train_index], run.generator, pruned)
    seen = run.train_index[order][: run.steps[epoch] * config.batch_size]

    is_silent = config.quiet or not processes.is_first()
    batches = seen.split(config.batch_size)
    bar = tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=is_silent)
    outputs = []
    run.model.train()
    for step, index in enumerate(bar, start=sum(run.steps[:epoch])):
        lr = learning_rate(step, sum(run.steps), run.warmup_steps, config.lr, config.schedule)
        # The first averages are short, to forget the initial weights soon.
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        loss, logits = training_step(run, index, lr, decay)
        outputs.append(logits)
        if step % 20 == 0:  # reading it stalls a GPU
            bar.set_postfix(loss=f"{loss.item():.4f}")

    logits = processes.gather(torch.cat(outputs))
    run.losses[seen] = F.cross_entropy(logits, run.labels[seen], reduction="none")
    if not all(tensor.isfinite().all() for tensor in run.ema.state_dict().values()):
        what = f"epoch {epoch + 1} has infinite or NaN weights"
        raise UserError(f"{what}: lower --lr, or give --precision float32")
    row = dict(epoch=epoch + 1, lr=lr, images=len(seen))
    if processes.is_first():
        names = run.data.class_names
        row |= report.summary("train", logits, run.labels[seen], names, config.quiet)
    # A number that you add to the row goes to history.csv and the checkpoints.
    return row


def training_step(run: Run, index: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """One step on the images of these indices, int64 (N,); returns loss and logits, (N, 10)."""
    x, y = augmented_batch(run, index)
    x, y = processes.own_part(x), processes.own_part(y)
    loss, logits = training_loss(run.compiled, run.teachers, x, y, run.config)
    loss.backward()
    processes.average_gradients(run.model)
    take_step(run.model, run.ema, run.optimizers, lr, decay, run.config.grad_clip)
    return loss.detach(), logits.detach()


def seed_for(seed: int, purpose: str, epoch: int = 0, rank: int = 0) -> int:
    """A seed of its own for each purpose, epoch and process."""
    purposes = ("weights", "flips", "batches", "layers")
    numbers = (seed, purposes.index(purpose), epoch, rank)
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed what draws without a generator: stochastic depth, your own code."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# ---- The start of a run ----


def start_run(config: SimpleNamespace, resume: bool = False, model: nn.Module | None = None) -> Run:
    """A new or resumed run, in whose `config` "auto" is replaced by a choice.

    Another model may be given.
    """
    config, device = processes.settle(config)
    images, labels, train_index, val_index = load_data(config, device)
    data = dataset.describe(config.data_dir, images)
    teachers = runs.load_teachers(config, data, labels, device)
    steps, pruned = runs.plan_steps(config, len(train_index))
    seed_everything(seed_for(config.seed, "weights"))
    # MPS gets the gradients of batch norm wrong (pytorch issue 175189).
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    model = (model or make_model(config, data)).to(device, memory_format=layout)
    if config.whiten:
        whiten_first_layer(model, dataset.normalize(images[train_index[:5000]], data))
    if config.start and not resume:
        runs.load_start(model, user_path(config.start))
        if config.val_size and processes.is_first():
            print("note: --start may have been trained on the validation images: give --val-size 0")
    optimizers = make_optimizers(model, config.optimizer, config.weight_decay, config.momentum)
    check_optimizers(model, optimizers)
    run = Run(
        config=config,
        data=data,
        images=images,
        labels=labels,
        train_index=train_index,
        val_index=val_index,
        steps=steps,
        pruned=pruned,
        model=model,
        optimizers=optimizers,
        teachers=teachers,
    )
    if resume:
        runs.resume_run(run)
    if config.compile:
        run.compiled = torch.compile(model, dynamic=False)
        run.teachers = [torch.compile(teacher, dynamic=False) for teacher in run.teachers]
    return run


def make_model(config: SimpleNamespace, data: DataInfo = FASHION_MNIST) -> HybridClassifier:
    """A model of these settings."""
    try:
        shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    except AttributeError as error:
        raise UserError(f"ModelConfig has {error.name}: give it a row in SETTINGS") from error
    return HybridClassifier(ModelConfig(**shape), data)


# ---- The command line ----


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: no half-written file
    default, _, meaning = SETTINGS["recipe"]
    table = SETTINGS | dict(recipe=(default, tuple(RECIPES), meaning))
    text = __doc__.replace("python train.py", command(sys.argv[0]))
    parser = make_parser(table, text, GROUPS)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with the run in --output-dir, or start one")
    add("--evaluate", metavar="CHECKPOINT", help="test a checkpoint, train nothing")
    given = vars(parser.parse_args())
    with errors_in_one_line("train.py"), outlive_output("train.py"):
        if "evaluate" in given:
            evaluate_command(given.pop("evaluate"), given)
        else:
            train_command(given.pop("resume", False), given)
    processes.leave()


def train_command(resume: bool, given: dict[str, Any]) -> None:
    """Train, or go on with the run in the folder, then test."""
    config = choose_settings(SETTINGS, RECIPES, given)
    folder = user_path(config.output_dir)
    if processes.is_restarted():
        resume = resume or runs.has_saved(folder)
    if resume and not (folder / "last.pt").exists():
        resume = False
        if processes.is_first():
            what = f"starting one of recipe {config.recipe} on {config.data_dir}"
            print(f"there is no run to resume in {folder}: {what}")
    if resume:
        saved = runs.load_run(folder)["train_config"]
        given = {name: getattr(config, name) for name in given}
        for name in ("device", "precision", "threads"):
            if given.get(name) in ("auto", 0):  # the run keeps what it came to
                del given[name]
        given["output_dir"] = config.output_dir  # the folder may have been moved
        settings = resumed_settings(SETTINGS, saved, given, MAY_CHANGE_ON_RESUME)
        config = choose_settings(SETTINGS, RECIPES, settings)
    with runs.reserve_folder(folder, resume):
        best = train(config, resume)
    if processes.is_first():
        evaluate(best, config)


def evaluate_command(checkpoint: str, given: dict[str, Any]) -> None:
    """Test a checkpoint; other flags are refused."""
    unused = sorted(given.keys() - {"data_dir", "device", "threads", "quiet"})
    if unused:
        raise UserError(f"--evaluate does not use {', '.join(map(flag, unused))}: leave it out")
    config = choose_settings(SETTINGS, RECIPES, given)
    processes.set_threads(config.threads)
    evaluate(user_path(checkpoint), config)


def evaluate(path: Path, config: SimpleNamespace) -> None:
    """Print a checkpoint's report on the test split, and draw its pictures beside it."""
    device = processes.choose_device(config.device)
    model, checkpoint = load_checkpoint(path, device)
    check_classes(path, model, config.data_dir)
    images, labels = dataset.load(config.data_dir, train=False, read_image=read_picture)
    logits = predict(model, images.to(device), model.data).cpu()
    if not config.quiet:
        print(f"\n{printable(path)}")
    names = model.data.class_names
    row = report.summary("test", logits, labels, names, config.quiet)
    print(f"test accuracy {row['test_accuracy']:.4f}, loss {row['test_loss']:.4f}", end=", ")
    print(f"{model.num_parameters():,} parameters, {len(labels):,} images")
    predictions = logits.argmax(dim=1)
    history = checkpoint["history"]
    try:
        report.save_pictures(path, history, labels, predictions, names, config.quiet)
    except UserError as error:  # the folder may be read-only
        print(f"note: no pictures: {error}")
    if config.quiet:
        return
    words = [Path(sys.argv[0]).with_name("Visulization.py"), "--checkpoint", path]
    if config.data_dir != "data":
        words += ["--data-dir", config.data_dir]
    print("heatmaps:", command(*words))


if __name__ == "__main__":
    main()
