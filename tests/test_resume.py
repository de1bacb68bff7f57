"""Runs that are stopped, killed, started again, or saved where an earlier one lies."""

import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_alike, assert_identical, state_of

import train
from common.console import command
from common.files import UserError
from model import load_checkpoint
from training import report, runs


@pytest.fixture
def stop(monkeypatch):
    """Raises an exception, or calls a function, after this many steps of `take_step`."""
    take_step = train.take_step

    def stop(at, what=KeyboardInterrupt):
        calls = []

        def counting(*arguments):
            take_step(*arguments)
            calls.append(1)
            if len(calls) == at:
                if isinstance(what, type):
                    raise what
                what(*arguments)

        monkeypatch.setattr(train, "take_step", counting)

    return stop


@pytest.fixture
def whole_and_parts(run_config, tmp_path):
    """The settings of two runs alike in folders of these names."""

    def make(**changes):
        names = ("whole", "parts")
        return [run_config(output_dir=str(tmp_path / name), **changes) for name in names]

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


# ---- Going on ----


@pytest.mark.parametrize(
    "changes",
    [
        dict(alternate_flip=True, skip_easy=0.5, whiten=True),
        dict(cutmix=0.5, optimizer="adamw", val_size=0),
        dict(teacher_weight=1.0, temperature=2.0),
        dict(stretch=1.5),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(
    whole_and_parts, teacher, stop, tmp_path, changes
):
    if "temperature" in changes:
        changes = changes | dict(teacher=(str(teacher),))
    if "stretch" in changes:
        changes = changes | dict(start=str(teacher))
    whole, parts = whole_and_parts(**changes, epochs=3)
    train.train(whole)
    stop(13)  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        train.train(parts)
    assert len(load_checkpoint(tmp_path / "parts" / "last.pt")[1]["history"]) == 1
    stop(1000)
    train.train(parts, resume=True)
    assert_alike(tmp_path)


@pytest.mark.parametrize("killed", ["best.pt", "last.pt"])
def test_a_run_killed_while_it_saves_repeats_the_epoch(
    whole_and_parts, monkeypatch, tmp_path, killed
):
    whole, parts = whole_and_parts(val_size=0)
    best = load_checkpoint(train.train(whole))[1]
    assert best["epoch"] == 2  # without a validation split it is the last
    save_checkpoint, calls = runs.save_checkpoint, []

    def save(path, *arguments, **contents):
        calls.append(path.name)
        if calls.count(killed) == 2:
            raise KeyboardInterrupt
        save_checkpoint(path, *arguments, **contents)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            train.train(parts)
    train.train(parts, resume=True)
    assert_alike(tmp_path)
    table = (tmp_path / "parts" / "history.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()] == ["epoch", "1", "2"]


def test_the_best_epoch_is_kept_and_of_equals_the_first(run_config, monkeypatch, tmp_path):
    summary, save_run, weights = report.summary, runs.save_run, []
    accuracies = iter([0.5, 0.7, 0.7, 0.6])

    def told(split, *arguments):
        row = summary(split, *arguments)
        return row | dict(val_accuracy=next(accuracies)) if split == "val" else row

    def saving(run, row):
        weights.append({name: tensor.clone() for name, tensor in run.ema.state_dict().items()})
        save_run(run, row)

    monkeypatch.setattr(report, "summary", told)
    monkeypatch.setattr(runs, "save_run", saving)
    path = train.train(run_config(epochs=4))
    best, last = load_checkpoint(path)[1], load_checkpoint(path.with_name("last.pt"))[1]
    assert best["epoch"] == 2 and last["epoch"] == 4
    assert_identical(best["model"], weights[1])
    assert_identical(last["model"], weights[3])
    expected = state_of(path.parent, "best.pt")
    path.unlink()
    train.train(run_config(epochs=4), resume=True)
    assert_identical(state_of(path.parent, "best.pt"), expected)  # it is made again


def test_the_seconds_of_all_parts_of_a_run_are_added_up(
    run_config, stop, monkeypatch, capsys, tmp_path
):
    times = iter(range(0, 10_000, 100))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    stop(14)
    with pytest.raises(KeyboardInterrupt):
        train.train(run_config())
    train.train(run_config(), resume=True)
    history = load_checkpoint(tmp_path / "run" / "last.pt")[1]["history"]
    assert [row["seconds"] for row in history] == [100, 200]
    assert "elapsed 0:03:20  remaining 0:00:00" in capsys.readouterr().out


def test_another_or_unfinished_teacher_is_refused(run_config, teacher, stop, tmp_path):
    config = run_config(teacher=(str(teacher),), epochs=1)
    train.train(config)
    moved = teacher.rename(tmp_path / "moved.pt")
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        train.train(run_config(output_dir=str(teacher.parent)))
    with pytest.raises(UserError, match=r"best\.pt is of an unfinished run: finish it"):
        train.train(config)
    stop(1000)
    train.train(run_config(output_dir=str(teacher.parent)), resume=True)
    with pytest.raises(UserError, match="the teacher has changed"):
        train.train(config, resume=True)
    train.train(run_config(teacher=(str(moved),), epochs=1), resume=True)


def test_a_process_that_torchrun_starts_again_goes_on(main, flags, monkeypatch, capsys):
    assert main(*flags) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(*flags) == 0
    assert "going on after epoch 2 of 2" in capsys.readouterr().out
    os.utime("checkpoints/last.pt", (1, 1))  # of an earlier run
    assert main(*flags) == 0
    assert "going on" not in capsys.readouterr().out


# ---- What is not saved, and what is not overwritten ----


def test_what_is_no_longer_finite_is_never_saved(run_config, stop, tmp_path):
    def break_a_weight(model, ema, *_):
        ema.head.weight.data[0, 0] = math.inf  # the epoch's losses were all finite

    stop(20, break_a_weight)
    with pytest.raises(UserError, match=r"epoch 2 has infinite or NaN weights: lower --lr"):
        train.train(run_config(val_size=0))
    for name in ("best.pt", "last.pt"):
        assert len(load_checkpoint(tmp_path / "run" / name)[1]["history"]) == 1


def test_earlier_runs_are_put_aside_and_nothing_is_overwritten(run_config, tmp_path):
    kept, run = [], tmp_path / "run"
    for seed in range(3):
        kept.append(train.train(run_config(epochs=1, seed=seed)).read_bytes())
        (run / "best_curves.png").write_text(f"curves of {seed}")
        (run / "best_friend.png").write_text("a person's own")
    for i, prefix in enumerate(("previous-1-", "previous-2-", "")):
        assert (run / f"{prefix}best.pt").read_bytes() == kept[i]
        assert (run / f"{prefix}best_curves.png").read_text() == f"curves of {i}"
        assert (run / f"{prefix}last.pt").exists() and (run / f"{prefix}history.csv").exists()
    assert (run / "best_friend.png").exists() and len(contents(run)) == 3 * 4 + 1


# ---- The command line ----


def test_a_folder_takes_one_run_at_a_time(main, flags, tmp_path):
    part, other = tmp_path / "new" / "run" / ".best.pt.123.part", ".download.part"
    with runs.reserve_folder(part.parent):
        part.touch()
        (part.parent / other).touch()
        os.utime(part.parent / ".lock", (1, 1))  # when that run began
        assert "another run is writing to" in main(*flags, "--output-dir", part.parent)
        assert part.exists() and (part.parent / ".lock").stat().st_mtime == 1
    assert main(*flags, "--epochs", 1, "--output-dir", part.parent) == 0
    # it was of a run that was killed while it saved
    assert not part.exists() and (part.parent / other).exists()
    (tmp_path / "a file").touch()
    assert "cannot write to a file/run: " in main(*flags, "--output-dir", "a file/run")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(main, flags, stop, capsys, tmp_path, number, status):
    whole, parts = tmp_path / "whole", tmp_path / "the parts"
    assert main(*flags, "--output-dir", whole) == 0
    again = command("train.py", "--resume", "--output-dir", parts)
    for step, words in ((12, flags), (3, ["--resume"])):  # the second time, nothing new is saved
        stop(step, lambda *_: os.kill(os.getpid(), number))
        assert main(*words, "--output-dir", parts) == status
        assert capsys.readouterr().out.endswith(f" with: {again}\n")
    stop(1000)
    parts.rename(tmp_path / "checkpoints")  # it goes on where it lies
    assert main("--resume") == 0
    (tmp_path / "checkpoints").rename(tmp_path / "parts")
    assert_alike(tmp_path)
    assert not parts.exists() and "test accuracy" in capsys.readouterr().out


def test_a_run_stopped_in_its_first_epoch_says_so(main, flags, stop, capsys):
    assert main(*flags, "--epochs", 1, "--resume") == 0
    out = capsys.readouterr().out
    assert "there is no run to resume in checkpoints: starting one" in out
    for folder in ("checkpoints", "new"):  # where an earlier run lies, and where none does
        stop(3)
        assert main(*flags, "--output-dir", folder) == 130
        output = capsys.readouterr()
        assert "no epoch was finished, so nothing was saved" in output.out.splitlines()[-1]
        assert output.err.splitlines()[-1] == "train.py: interrupted"


def test_a_finished_run_is_only_tested_again(main, flags, monkeypatch, capsys, tmp_path):
    assert main(*flags, "--no-quiet", "--epochs", 1) == 0
    out = capsys.readouterr().out
    for words in ("160 training images", "train split", "val split", "test accuracy"):
        assert out.count(words) == 1
    heatmaps = command("Visulization.py", "--checkpoint", "checkpoints/best.pt")
    assert out.endswith(f"\nheatmaps: {heatmaps} --data-dir {flags[-1]}\n")
    folder = tmp_path / "checkpoints"
    made = {"best.pt", "last.pt", "history.csv", "best_curves.png", "best_confusion_matrix.png"}
    before = contents(folder)
    assert before.keys() == made
    (tmp_path / "data").symlink_to(flags[-1])
    same = "--lr 0.008 --stem-dims 4 8 --device auto --precision auto --threads 0".split()
    assert main("--resume", "--data-dir", "data", *same) == 0
    out = capsys.readouterr().out
    assert out.endswith(f" {heatmaps}\n")
    assert "going on after epoch 1 of 1" in out
    assert contents(folder)["last.pt"] == before["last.pt"]
    for change in (["--lr", 0.5], ["--stem-dims", 4, 16], ["--no-flip"], ["--threads", 2]):
        name = change[0].replace("--no-", "--")
        assert f"the run to resume has {name} " in main("--resume", *change)
    shutil.copy(folder / "best.pt", folder / "last.pt")
    assert "last.pt holds only weights: start without --resume" in main("--resume")


def test_another_optimizer_is_refused_on_resume(run_config, monkeypatch):
    train.train(run_config(epochs=1))

    def edited(model, *_):
        return [torch.optim.SGD(model.parameters(), lr=0.0)]

    monkeypatch.setattr(train, "make_optimizers", edited)
    with pytest.raises(UserError, match="had another optimizer: start anew"):
        train.train(run_config(epochs=1), resume=True)
