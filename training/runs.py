"""A run on the disk: its folder, its teachers, `last.pt` to go on from, `best.pt` to keep, and `history.csv`."""

import itertools
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

import dataset
from common.files import UserError
from model import HybridClassifier, load_checkpoint, save_checkpoint
from training import familiarity, processes
from training.report import write_history

fcntl = None
with suppress(ImportError):
    import fcntl

History = list[dict[str, float]]  # a row of numbers for each epoch
State = tuple[nn.Module, HybridClassifier, list[torch.optim.Optimizer], torch.Tensor]  # model, ema, optimizers, losses


@contextmanager
def reserve_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it meanwhile; a UserError if another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}: give this one another --output-dir") from None
        except (OSError, AttributeError):  # Windows and some network drives have no locks
            pass
        else:
            for part in folder.glob(".*.[0-9]*.part"):  # of a run that was killed while it saved
                part.unlink()
        yield


def put_aside(folder: Path) -> None:
    """Rename what an earlier run left in the folder to previous-1-best.pt and so on; nothing is overwritten."""
    patterns = ("last.pt", "best.pt", "last_*.png", "best_*.png", "history.csv")  # last.pt first
    earlier = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    number = next(n for n in itertools.count(1) if not any(folder.glob(f"previous-{n}-*")))
    for path in earlier:
        os.replace(path, path.with_name(f"previous-{number}-{path.name}"))
    if earlier:
        print(f"an earlier run's {', '.join(path.name for path in earlier)} are now {folder}/previous-{number}-*")


def is_best(history: History) -> bool:
    """Whether the latest epoch has the highest validation accuracy so far; without a validation split it always is."""
    return history[-1] is max(history, key=lambda row: row.get("val_accuracy", row["epoch"]))


def save_run(folder: Path, config: SimpleNamespace, history: History, state: State) -> None:
    """Save what the next epoch needs as last.pt, the averaged weights as best.pt if they are best, and history.csv."""
    if len(history) == 1:
        put_aside(folder)
    environment = processes.environment(config.device, config.precision, config.threads)
    contents = dict(train_config=vars(config), history=history, epoch=len(history), environment=environment)
    model, ema, optimizers, losses = state
    training = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], losses=losses)
    # last.pt comes last, so a run that is killed before that repeats this epoch, bit for bit.
    if is_best(history) or not (folder / "best.pt").exists():
        save_checkpoint(folder / "best.pt", ema, **contents)
    write_history(history, folder / "history.csv")
    save_checkpoint(folder / "last.pt", ema, **contents, training=training | dict(processes=processes.count()))


def load_run(folder: Path) -> dict:
    """The contents of the folder's last.pt; a UserError if it is not there, or of another kind."""
    if not (folder / "last.pt").exists():
        raise UserError(f"there is no run to resume in {folder}: name its --output-dir, or start without --resume")
    checkpoint = load_checkpoint(folder / "last.pt")[1]
    if "training" not in checkpoint:
        raise UserError(f"{folder / 'last.pt'} holds weights, but no run to resume: start without --resume")
    return checkpoint


def resume_run(folder: Path, state: State) -> History:
    """Load what `save_run` saved into `state`, and return the history."""
    model, ema, optimizers, losses = state
    checkpoint = load_run(folder)
    training = checkpoint["training"]
    if (before := training["processes"]) != processes.count():  # batch norm would see other batches
        raise UserError(f"the run to resume had {before} processes, not {processes.count()}: start as many again")
    ema.load_state_dict(checkpoint["model"])
    model.load_state_dict(training["model"])
    for optimizer, saved in zip(optimizers, training["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    losses.copy_(training["losses"])
    if processes.is_first():
        planned = checkpoint["train_config"]["epochs"]
        print(f"going on with {folder / 'last.pt'} after epoch {checkpoint['epoch']} of {planned}")
    return checkpoint["history"]


def load_teachers(config: SimpleNamespace, labels: torch.Tensor, device: torch.device) -> list[nn.Module]:
    """Load the teachers. A UserError for one that is missing, unfinished, this run's own, or saw validation images."""
    val_index, teachers = dataset.split_indices(labels, config.val_size, config.seed)[1], []
    own = [os.path.realpath(os.path.expanduser(f"{config.output_dir}/{name}.pt")) for name in ("best", "last")]
    for path in [config.teacher] if isinstance(config.teacher, str) else config.teacher:
        if os.path.realpath(os.path.expanduser(path)) in own:
            raise UserError(f"the teacher {path} lies where this run saves: give another --output-dir")
        is_default = config.recipe == "record" and os.path.basename(path) == "best.pt"
        if is_default and not os.path.exists(os.path.expanduser(path)):
            folder = shlex.quote(os.path.dirname(path) or ".")
            raise UserError(f"{path} is missing: first run train.py --recipe teacher --output-dir {folder}")
        teacher, checkpoint = load_checkpoint(path, device)
        saw = checkpoint.get("train_config", {})  # without it, the teacher may have seen every image
        epochs, planned = len(checkpoint.get("history", ())), saw.get("epochs", 0)
        if epochs < planned:
            advice = "finish it with train.py --resume, or name another teacher"
            raise UserError(f"{path} is from a run that stopped after {epochs} of {planned} epochs: {advice}")
        val_size, seed = saw.get("val_size", 0), saw.get("seed", 0)
        if not torch.isin(val_index, dataset.split_indices(labels, val_size, seed)[1]).all():
            advice = f", or --val-size {val_size} --seed {seed} as it had" if val_size else ""
            raise UserError(f"{path} was trained on images that this run validates on: give --val-size 0{advice}")
        teachers.append(teacher.requires_grad_(False))
    return teachers


def advice_to_resume(folder: Path, since: float) -> str:
    """How to go on with a run that stops now and began at `time.time()` = since."""
    last, nothing = folder / "last.pt", "no epoch was finished, so nothing was saved"
    if not last.exists():
        return nothing
    if last.stat().st_mtime < since:
        return f"{nothing}; {last} is of an earlier run"
    launcher = "python" if processes.count() == 1 else f"torchrun --nproc-per-node={processes.count()}"
    return f"go on from the last whole epoch with: {launcher} train.py --resume --output-dir {shlex.quote(str(folder))}"


def finish_run(folder: Path, history: History, trained: tuple, held_out: tuple | None) -> None:
    """Add the whole history and the statistics of `familiarity.measure` to best.pt.

    `trained` is images, labels and the indices that were trained on; `held_out`, images and labels that were not.
    """
    model, best = load_checkpoint(folder / "best.pt")
    contents = {name: best[name] for name in ("train_config", "epoch", "environment")}
    images, labels = (tensor[trained[2][: 2 * familiarity.SAMPLE]].cpu() for tensor in trained[:2])
    known, others = (images, held_out[0].cpu()) if held_out else images.chunk(2)
    contents["familiar"] = familiarity.measure(model, known, labels[: len(known)], others)
    save_checkpoint(folder / "best.pt", model, **contents, history=history)
