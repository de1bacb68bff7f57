"""A run and what it leaves on the disk: `last.pt` to go on from, `best.pt`, the history."""

import copy
import itertools
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import dataset
from common.console import command
from common.files import UserError, checksum, user_path
from dataset import DataInfo
from model import HybridClassifier, load_checkpoint, save_checkpoint
from training import processes
from training.report import write_history

FILES_OF_A_RUN = ["last.pt", "best.pt", "history.csv"]
FILES_OF_A_RUN += ["best_curves.png", "best_confusion_matrix.png"]
FILES_OF_A_RUN += ["last_curves.png", "last_confusion_matrix.png"]


@dataclass
class Run:
    """What a run looks at, and what its steps change."""

    config: SimpleNamespace
    data: DataInfo
    images: Tensor  # all training images, uint8 (60000, 1, 28, 28), on the device
    labels: Tensor  # int64 (60000,)
    train_index: Tensor  # those to train on, int64 (N,)
    val_index: Tensor  # those to validate on, int64 (M,)
    steps: list[int]  # of each epoch
    pruned: int  # how many images later epochs leave out
    model: HybridClassifier
    optimizers: list[torch.optim.Optimizer]
    teachers: list[nn.Module]
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each epoch

    def __post_init__(self) -> None:
        warmup_steps = self.config.warmup_epochs * self.steps[0]
        self.warmup_steps = round(min(warmup_steps, sum(self.steps) / 4))
        self.originals = self.images.clone()  # `alternate_flip` changes `images`
        self.compiled = self.model  # or what torch.compile makes of it
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)  # averaged weights
        self.best = copy.deepcopy(self.ema)  # those of the best epoch
        # The loss of each image when last seen.
        self.losses = torch.full_like(self.labels, 100, dtype=torch.float32)
        self.generator = torch.Generator(self.images.device)  # for order and augmentation
        self.checksums = [checksum(path) for path in paths_of_teachers(self.config)]
        self.data_checksum = zlib.crc32(self.images.cpu().contiguous().numpy())
        self.data_checksum = zlib.crc32(self.labels.cpu().numpy(), self.data_checksum)

    @property
    def folder(self) -> Path:
        return user_path(self.config.output_dir)


def plan_steps(config: SimpleNamespace, size: int) -> tuple[list[int], int]:
    """The steps of each epoch, and how many of `size` images later epochs prune."""
    pruned = 0
    if config.epochs > 1:
        pruned = round(config.skip_easy * dataset.EASY_SHARE * size)
    later = (size - pruned) // config.batch_size
    steps = [size // config.batch_size] + [later] * (config.epochs - 1)
    if not steps[-1] or config.batch_size % processes.count():
        advice = f"give at most {size - pruned:,}"
        if pruned:
            advice += ", which are left when easy images are pruned"
        if processes.count() > 1:
            advice += f", divisible by the {processes.count()} processes"
        raise UserError(f"--batch-size {config.batch_size}: {advice}")
    return steps, pruned


# ---- The folder ----


@contextmanager
def reserve_folder(folder: Path, resumed: bool = False) -> Iterator[None]:
    """Make the folder of a run and keep others out; if the run is stopped, say how to go on."""
    if not processes.is_first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        reason = f"{error.strerror}; give another --output-dir"
        raise UserError(f"cannot write to {folder}: {reason}") from error
    if is_taken(lock):
        raise UserError(f"another run is writing to {folder}: give another --output-dir")
    if not processes.is_restarted():
        os.utime(folder / ".lock")  # the start, see `has_saved`
    for part in folder.glob(".*.[0-9]*.part"):  # of a run that was killed while it saved
        part.unlink()
    last = folder / "last.pt"
    before = last.exists() and last.stat().st_mtime_ns
    try:
        with lock:
            yield
    except (KeyboardInterrupt, SystemExit):
        advice = "no epoch was finished, so nothing was saved: start again"
        if resumed or (last.exists() and last.stat().st_mtime_ns) != before:
            words = [sys.argv[0], "--resume", "--output-dir", folder]
            again = command(*words, processes=processes.count())
            advice = f"go on from the last whole epoch with: {again}"
        print(f"\nstopping; {advice}", flush=True)
        raise


def has_saved(folder: Path) -> bool:
    """Whether last.pt is of the run that was last started in this folder, not an earlier one."""
    last = folder / "last.pt"
    return last.exists() and last.stat().st_mtime_ns >= (folder / ".lock").stat().st_mtime_ns


def is_taken(lock: TextIO) -> bool:
    """Lock this file until it is closed; returns whether another run has done so."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network drives have no locks
        pass
    return False


def put_aside(folder: Path) -> None:
    """Rename what an earlier run left to previous-1-best.pt and so on."""
    earlier = [folder / name for name in FILES_OF_A_RUN if (folder / name).exists()]
    number = next(n for n in itertools.count(1) if not any(folder.glob(f"previous-{n}-*")))
    for path in earlier:
        path.rename(folder / f"previous-{number}-{path.name}")
    if earlier:
        print(f"an earlier run's files are now {folder}/previous-{number}-*")


# ---- Saving and resuming ----


def best_epoch(run: Run) -> int:
    """The epoch, from 1, of the best validation accuracy, or else the last."""
    return max(run.history, key=lambda row: row.get("val_accuracy", row["epoch"]))["epoch"]


def contents_of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds besides the weights."""
    environment = processes.environment(run.config)
    return dict(train_config=vars(run.config), history=run.history, environment=environment)


def save_best(run: Run) -> None:
    """Save the best epoch's averaged weights, and the history as a table."""
    epoch = best_epoch(run)
    save_checkpoint(run.folder / "best.pt", run.best, epoch=epoch, **contents_of(run))
    write_history(run.history, run.folder / "history.csv")


def save_run(run: Run, row: dict[str, Any]) -> None:
    """Add an epoch's row to the history, and save all files."""
    for name, value in row.items():
        if hasattr(value, "tolist"):  # a tensor of your own
            row[name] = value.tolist()
    run.history.append(row)
    epoch = len(run.history)
    if epoch == 1:
        put_aside(run.folder)
    if best_epoch(run) == epoch:
        run.best.load_state_dict(run.ema.state_dict())
    save_best(run)
    state = dict(
        model=run.model.state_dict(),
        best=run.best.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in run.optimizers],
        losses=run.losses,
        checksums=run.checksums,
        data_checksum=run.data_checksum,
        processes=processes.count(),
    )
    # It comes last: a run that is killed before repeats this epoch.
    contents = dict(epoch=epoch, training=state) | contents_of(run)
    save_checkpoint(run.folder / "last.pt", run.ema, **contents)


def load_run(folder: Path) -> dict[str, Any]:
    """The contents of the folder's last.pt."""
    checkpoint = load_checkpoint(folder / "last.pt")[1]
    if "training" not in checkpoint:
        raise UserError(f"{folder / 'last.pt'} holds only weights: start without --resume")
    return checkpoint


def resume_run(run: Run) -> None:
    """Bring a new run to where the one in its folder stopped."""
    checkpoint = load_run(run.folder)
    state, count = checkpoint["training"], processes.count()
    if state["processes"] != count:  # batch norm would see other batches
        what = f"the run to resume had {state['processes']} processes, not {count}"
        raise UserError(f"{what}: start as many again")
    if state["data_checksum"] != run.data_checksum or DataInfo(**checkpoint["data"]) != run.data:
        raise UserError("the data has changed since the run began: put it back")
    if state["checksums"] != run.checksums:
        raise UserError("the teacher has changed since the run began: put the old one back")
    try:
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except ValueError as error:
        raise UserError("the run to resume had another optimizer: start anew") from error
    run.model.load_state_dict(state["model"])
    run.best.load_state_dict(state["best"])
    run.losses.copy_(state["losses"])
    run.ema.load_state_dict(checkpoint["model"])
    run.history = checkpoint["history"]
    if processes.is_first():
        print(f"going on after epoch {len(run.history)} of {run.config.epochs}")
        save_best(run)  # it may be lost, or of the next epoch


# ---- Other checkpoints ----


def load_start(model: nn.Module, path: Path) -> None:
    """Give a new model the weights of a checkpoint, or refuse them."""
    weights = load_checkpoint(path)[1]["model"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = f"--start {path} is of another model: give that model's settings"
        raise UserError(what) from error


def paths_of_teachers(config: SimpleNamespace) -> list[Path]:
    """The checkpoints that a run learns from; a default may be one path."""
    paths = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    return [user_path(path) for path in paths]


def load_teachers(
    config: SimpleNamespace, data: DataInfo, labels: Tensor, device: torch.device
) -> list[nn.Module]:
    """Load the teachers; none may have been trained on images to validate on."""
    val_index = dataset.split_indices(labels, config.val_size, config.seed)[1]
    folder = user_path(config.output_dir).resolve()
    teachers = []
    for path in paths_of_teachers(config):
        if config.recipe == "record" and path.name == "best.pt" and not path.exists():
            first = command(sys.argv[0], "--recipe", "teacher", "--output-dir", path.parent)
            raise UserError(f"there is no teacher {path} yet: first run {first}")
        if path.resolve() in (folder / "best.pt", folder / "last.pt"):
            raise UserError(f"{path} lies where this run saves: give another --output-dir")
        teacher, checkpoint = load_checkpoint(path, device)
        if teacher.data != data:
            raise UserError(f"{path} was trained on other data than {config.data_dir}: change one")
        theirs = checkpoint["train_config"]
        if len(checkpoint["history"]) < theirs["epochs"]:
            raise UserError(f"{path} is of an unfinished run: finish it with --resume")
        unseen = dataset.split_indices(labels, theirs["val_size"], theirs["seed"])[1]
        if not torch.isin(val_index, unseen).all():
            advice = "give --val-size 0, or the teacher's --val-size and --seed"
            raise UserError(f"{path} was trained on images to validate on: {advice}")
        teachers.append(teacher.requires_grad_(False))
    return teachers
