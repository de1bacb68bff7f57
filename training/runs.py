"""A run and what it leaves on the disk: `last.pt` to go on from, `best.pt` to keep, the history."""

import copy
import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn

import dataset
from common.files import UserError
from model import HybridClassifier, load_checkpoint, save_checkpoint
from training import processes
from training.report import write_history

fcntl = None
with suppress(ImportError):
    import fcntl

History = list[dict[str, float]]  # a row of numbers for each epoch
PICTURES = ("curves", "confusion_matrix")  # which `report.save_pictures` draws beside a checkpoint
FILES_OF_A_RUN = ("last.pt", "best.pt", "history.csv")
FILES_OF_A_RUN += tuple(
    f"{name}_{picture}.png" for name in ("best", "last") for picture in PICTURES
)


@dataclass
class Run:
    """A training run: what it looks at, and what its steps change."""

    config: SimpleNamespace
    images: torch.Tensor  # all training images, uint8 (60000, 1, 28, 28), on the device
    labels: torch.Tensor  # int64 (60000,)
    train_index: torch.Tensor  # those to train on, int64 (N,)
    # Images and labels of the splits to report on.
    held_out: dict[str, tuple[torch.Tensor, torch.Tensor]]
    steps: list[int]  # of each epoch
    pruned: int  # images that each later epoch leaves out
    warmup_steps: int
    model: HybridClassifier
    ema: HybridClassifier  # the averaged weights
    optimizers: list[torch.optim.Optimizer]
    teachers: list[nn.Module]
    teacher_checksums: list[str]
    losses: torch.Tensor  # of each image when last seen, float (60000,)
    generator: torch.Generator  # for the order and the augmentation
    history: History = field(default_factory=list)
    step: Callable | None = None  # `train.training_step` of this run, or its recording

    def __post_init__(self) -> None:
        # `images` may be mirrored, see `dataset.alternate_flip`
        self.originals = self.images.clone()
        self.compiled = self.model  # or what torch.compile makes of it
        self.best = copy.deepcopy(self.ema)  # the averaged weights of the best epoch

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.config.output_dir))

    def state_dict(self) -> dict[str, Any]:
        """What the next epoch needs, besides the averaged weights and the history."""
        return dict(
            model=self.model.state_dict(),
            best=self.best.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            losses=self.losses,
            teachers=self.teacher_checksums,
            processes=processes.count(),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a UserError if that was another run."""
        if state.keys() != self.state_dict().keys():
            raise UserError(
                "the run to resume is of another version of this project: start without --resume"
            )
        before = state["processes"]
        if before != processes.count():  # batch norm would see other batches
            now = f"{before} processes, not {processes.count()}"
            raise UserError(f"the run to resume had {now}: start as many again")
        if state["teachers"] != self.teacher_checksums:
            what = "the teacher is not the one that the run began with"
            raise UserError(f"{what}: put that one back, or start anew")
        self.model.load_state_dict(state["model"])
        self.best.load_state_dict(state["best"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses.copy_(state["losses"])


# ---- The folder ----------------------------------------------------------------------------------


def time_of_last(folder: Path) -> str:
    """When last.pt was written, in nanoseconds; "" if there is none."""
    with suppress(OSError):
        return str((folder / "last.pt").stat().st_mtime_ns)
    return ""


def cannot_write(folder: Path, error: OSError) -> UserError:
    """What to say of a folder that a run cannot write to."""
    return UserError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir")


@contextmanager
def reserve_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it meanwhile, by a UserError.

    The file that is locked says which last.pt there was at the start, for `has_saved`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise cannot_write(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another run is writing to {folder}"
            raise UserError(f"{what}: give this one another --output-dir") from None
        except (OSError, AttributeError):  # Windows and some network drives have no locks
            pass
        else:
            for part in folder.glob(".*.[0-9]*.part"):  # of a run that was killed while it saved
                part.unlink()
        if not processes.is_restart():
            try:
                (folder / ".lock").write_text(time_of_last(folder))
            except OSError as error:  # the disk is full
                raise cannot_write(folder, error) from error
        yield


def has_saved(folder: Path) -> bool:
    """Whether this command has written last.pt, also before torchrun started it again.

    The clock may have been set back meanwhile, so this asks for another time, not for a later one.
    """
    lock, last = folder / ".lock", time_of_last(folder)
    return bool(last) and lock.exists() and lock.read_text() != last


def put_aside(folder: Path) -> None:
    """Rename what an earlier run left to previous-1-best.pt and so on; nothing is lost."""
    # last.pt is the first.
    earlier = [folder / name for name in FILES_OF_A_RUN if (folder / name).exists()]
    number = next(n for n in itertools.count(1) if not any(folder.glob(f"previous-{n}-*")))
    for path in earlier:
        os.replace(path, path.with_name(f"previous-{number}-{path.name}"))
    if earlier:
        names = ", ".join(path.name for path in earlier)
        print(f"an earlier run's {names} are now {folder}/previous-{number}-*")


def advice_to_resume(folder: Path, resumed: bool) -> str:
    """How to go on with a run that stops now."""
    last, nothing = folder / "last.pt", "no epoch was finished, so nothing was saved"
    if not last.exists():
        return nothing
    if not resumed and not has_saved(folder):
        return f"{nothing}; {last} is of an earlier run"
    launcher = "python"
    if processes.count() > 1:
        launcher = f"torchrun --nproc-per-node={processes.count()}"
    command = f"{launcher} train.py --resume --output-dir {shlex.quote(str(folder))}"
    return f"go on from the last whole epoch with: {command}"


# ---- Saving and resuming -------------------------------------------------------------------------


def best_epoch(history: History) -> int:
    """The first epoch of the highest validation accuracy, from 1; without such, the last one."""
    return max(history, key=lambda row: row.get("val_accuracy", row["epoch"]))["epoch"]


def contents_of(run: Run) -> dict[str, Any]:
    """What a checkpoint of a run says besides the weights."""
    config = run.config
    environment = processes.environment(config.device, config.precision, config.threads)
    return dict(train_config=vars(config), history=run.history, environment=environment)


def save_best(run: Run) -> None:
    """Save the averaged weights of the best epoch as best.pt, with the whole history."""
    epoch = best_epoch(run.history)
    save_checkpoint(run.folder / "best.pt", run.best, epoch=epoch, **contents_of(run))


def save_run(run: Run, row: dict[str, Any]) -> None:
    """Add an epoch's row to the history, and save best.pt, history.csv and last.pt."""
    # Tensors and arrays as numbers and lists.
    row = {n: value.tolist() if hasattr(value, "tolist") else value for n, value in row.items()}
    run.history.append(row)
    epoch = len(run.history)
    if epoch == 1:
        put_aside(run.folder)
    if best_epoch(run.history) == epoch:
        run.best.load_state_dict(run.ema.state_dict())
    # last.pt comes last, so a run that is killed before that repeats this epoch, bit for bit.
    save_best(run)
    write_history(run.history, run.folder / "history.csv")
    contents = contents_of(run) | dict(epoch=epoch, training=run.state_dict())
    save_checkpoint(run.folder / "last.pt", run.ema, **contents)


def load_run(folder: Path) -> dict:
    """The contents of the folder's last.pt; a UserError if it is of another kind."""
    checkpoint = load_checkpoint(folder / "last.pt")[1]
    if "training" not in checkpoint:
        raise UserError(
            f"{folder / 'last.pt'} holds weights, but no run to resume: start without --resume"
        )
    return checkpoint


def resume_run(run: Run) -> None:
    """Bring a new run to where the one in its folder stopped."""
    checkpoint = load_run(run.folder)
    try:
        run.load_state_dict(checkpoint["training"])
        run.ema.load_state_dict(checkpoint["model"])
        run.history = checkpoint["history"]
        if [row["epoch"] for row in run.history] != list(range(1, checkpoint["epoch"] + 1)):
            raise ValueError("the history is another run's")
        run.history[-1]["seconds"] + 0
    except UserError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"{run.folder / 'last.pt'} does not fit its own settings"
        raise UserError(f"{what}: start without --resume") from error
    if processes.is_first():
        done = f"after epoch {checkpoint['epoch']} of {run.config.epochs}"
        print(f"going on with {run.folder / 'last.pt'} {done}")
        if not (run.folder / "best.pt").exists():
            save_best(run)
        write_history(run.history, run.folder / "history.csv")


# ---- Teachers ------------------------------------------------------------------------------------


def paths_of_teachers(config: SimpleNamespace) -> list[str]:
    """The checkpoints that a run learns from; a default may be one word, without parentheses."""
    paths = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    return [os.path.expanduser(path) for path in paths]


def load_teachers(
    config: SimpleNamespace, labels: torch.Tensor, device: torch.device
) -> list[nn.Module]:
    """Load the teachers; a UserError for one that this run must not learn from."""
    _, val_index = dataset.split_indices(labels, config.val_size, config.seed)
    folder = os.path.realpath(os.path.expanduser(config.output_dir))
    own = [os.path.join(folder, name) for name in ("best.pt", "last.pt")]
    teachers = []
    for path in paths_of_teachers(config):
        if os.path.realpath(path) in own:
            raise UserError(
                f"the teacher {path} lies where this run saves: give another --output-dir"
            )
        is_default = config.recipe == "record" and os.path.basename(path) == "best.pt"
        if is_default and not os.path.exists(path):
            folder = shlex.quote(os.path.dirname(path) or ".")
            raise UserError(
                f"{path} is missing: first run train.py --recipe teacher --output-dir {folder}"
            )
        teacher, checkpoint = load_checkpoint(path, device)
        # Without it, the teacher may have seen every image.
        saw = checkpoint.get("train_config", {})
        planned, val_size, seed = (saw.get(name, 0) for name in ("epochs", "val_size", "seed"))
        if not all(isinstance(number, int) for number in (planned, val_size, seed)):
            raise UserError(f"{path} does not say what it was trained on: name another teacher")
        epochs = len(checkpoint.get("history", ()))
        if epochs < planned:
            advice = "finish it with train.py --resume, or name another teacher"
            raise UserError(
                f"{path} is from a run that stopped after {epochs} of {planned} epochs: {advice}"
            )
        if not torch.isin(val_index, dataset.split_indices(labels, val_size, seed)[1]).all():
            advice = "give --val-size 0"
            if val_size:
                advice += f", or --val-size {val_size} --seed {seed} as it had"
            raise UserError(f"{path} was trained on images that this run validates on: {advice}")
        teachers.append(teacher.requires_grad_(False))
    return teachers
