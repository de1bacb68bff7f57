import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import dataset
import train
from model import load_checkpoint
from train import DEFAULTS, TrainingError

TEACHER = str(ROOT / "checkpoints" / "shipped" / "model.pt")


def state_of(run: Path) -> dict:
    """Everything that decides how a run goes on, without the times."""
    checkpoint = load_checkpoint(run / "last.pt")[1]
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint["history"]]
    training = {k: v for k, v in checkpoint["training"].items() if k != "seconds"}
    return dict(model=checkpoint["model"], history=history, training=training)


def assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


@pytest.fixture
def stop_at_step(monkeypatch):
    """Sends this process a signal after so many optimiser steps, as a person's Ctrl-C would arrive."""

    def arm(step: int, number: int) -> None:
        update_ema, calls = train.update_ema, []

        def counting(*arguments):
            update_ema(*arguments)
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train, "update_ema", counting)

    return arm


@pytest.mark.parametrize("step", [3, 10, 14])  # within the first epoch, at its very end, within the second
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    run_config, stop_at_step, tmp_path, monkeypatch, capsys, step, optimizer
):
    whole, parts = (run_config(output_dir=str(tmp_path / name), optimizer=optimizer) for name in ("whole", "parts"))
    train.train(whole)
    stop_at_step(step, signal.SIGINT if step < 10 else signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train.train(parts)
    assert stopped.value.code == (130 if step < 10 else 143)
    assert f"python train.py --resume --output-dir {parts.output_dir}" in capsys.readouterr().out
    monkeypatch.undo()
    torch.rand(5)  # the state of the global generator must come from the checkpoint
    train.train(parts, resume=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert_identical(
        load_checkpoint(tmp_path / "whole" / "best.pt")[1]["model"],
        load_checkpoint(tmp_path / "parts" / "best.pt")[1]["model"],
    )
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "parts")]
    assert files[0] == files[1] == ["best.pt", "history.csv", "last.pt"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_and_number_of_threads_give_the_same_weights(run_config, tmp_path, threads):
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("one", "two"):
            train.train(run_config(output_dir=str(tmp_path / name), compile=False))
            torch.rand(3)  # whatever happens in between
    finally:
        torch.set_num_threads(threads_before)
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    assert_identical(one, two)
    environment = load_checkpoint(tmp_path / "one" / "best.pt")[1]["environment"]
    assert f"{threads} CPU threads" in environment  # a checkpoint says with how many


@pytest.fixture
def poison(monkeypatch):
    """Makes the batch of one call to `normalize` not a number."""

    def arm(call: int) -> None:
        normalize, calls = dataset.normalize, []

        def poisoned(images):
            calls.append(1)
            return normalize(images) * (math.nan if len(calls) == call else 1)

        monkeypatch.setattr(dataset, "normalize", poisoned)

    return arm


def test_a_loss_that_is_not_finite_leaves_an_earlier_run_alone(run_config, tmp_path, poison):
    train.train(run_config(epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    poison(call=5)
    with pytest.raises(TrainingError, match="no longer finite in epoch 1"):
        train.train(run_config(epochs=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoints(run_config, tmp_path, poison):
    poison(call=10 + 1 + 3)  # ten steps and one validation batch, then the third step of the second epoch
    with pytest.raises(TrainingError, match="no longer finite in epoch 2"):
        train.train(run_config())
    for name in ("best.pt", "last.pt"):
        assert len(load_checkpoint(tmp_path / "run" / name)[1]["history"]) == 1


@pytest.mark.parametrize("step", [4, 10])
def test_weights_that_are_not_finite_are_never_saved(run_config, stop_at_step, tmp_path, monkeypatch, step):
    # The loss of a step is looked at before its update: an update that breaks the weights shows only in these.
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(parameters, limit):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) == step:
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    if step == 4:  # the interrupted run is saved within the epoch
        stop_at_step(step, signal.SIGINT)
    with pytest.raises(TrainingError, match="no longer finite"):
        train.train(run_config(val_size=0))
    assert not list((tmp_path / "run").iterdir())


def test_a_new_run_puts_earlier_ones_aside(run_config, tmp_path):
    kept = []
    for seed in range(3):
        kept.append(train.train(run_config(epochs=1, seed=seed)).read_bytes())
    names = ["previous-1-best.pt", "previous-2-best.pt", "best.pt"]
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == kept


def test_evaluating_an_earlier_run_leaves_the_files_of_the_later_one_alone(run_config, data_dir, tmp_path):
    run = tmp_path / "run"
    for epochs in (1, 2):
        best = train.train(run_config(epochs=epochs, seed=epochs))
        train.evaluate(best, str(data_dir), torch.device("cpu"))
    kinds = ("best.pt", "confusion_matrix.png", "curves.png", "history.csv")
    assert {path.name for path in run.glob("previous-*")} == {f"previous-1-{name}" for name in (*kinds, "last.pt")}
    before = {path.name: path.read_bytes() for path in run.iterdir() if not path.name.startswith("previous-")}
    (run / "previous-1-history.csv").unlink()
    train.evaluate(run / "previous-1-best.pt", str(data_dir), torch.device("cpu"))
    assert all((run / name).read_bytes() == content for name, content in before.items())
    assert len((run / "previous-1-history.csv").read_text().splitlines()) == 2


def test_evaluating_the_best_epoch_leaves_the_history_of_later_ones(run_config, data_dir, tmp_path):
    run = tmp_path / "run"
    train.train(run_config(epochs=1))
    (run / "history.csv").write_text("longer\n")
    train.evaluate(run / "best.pt", str(data_dir), torch.device("cpu"))
    assert (run / "history.csv").read_text() == "longer\n"


def test_without_a_validation_split_the_last_weights_are_kept(run_config, tmp_path):
    path = train.train(run_config(val_size=0))
    best, last = load_checkpoint(path)[1], load_checkpoint(tmp_path / "run" / "last.pt")[1]
    assert best["epoch"] == 2
    assert_identical(best["model"], last["model"])


def test_the_best_epoch_is_the_one_kept(run_config):
    checkpoint = load_checkpoint(train.train(run_config(epochs=4)))[1]
    accuracies = [row["val_accuracy"] for row in checkpoint["history"]]
    assert len(accuracies) == 4
    assert checkpoint["epoch"] - 1 == accuracies.index(max(accuracies))
    assert checkpoint["val_accuracy"] == max(accuracies)


def test_the_kept_weights_are_the_average_and_give_the_reported_accuracy(run_config, data_dir):
    config = run_config()
    model, checkpoint = load_checkpoint(train.train(config))
    images, labels = dataset.load(data_dir, train=True)
    val = dataset.split_indices(labels, config.val_size, config.seed)[1]
    accuracy = (train.predict(model, images[val]).argmax(dim=1) == labels[val]).double().mean().item()
    assert accuracy == pytest.approx(checkpoint["val_accuracy"])


def test_warm_up_then_cosine_down_to_nothing():
    lrs = [train.learning_rate(step, total_steps=100, warmup_steps=10, peak=0.5) for step in range(100)]
    assert lrs[9] == max(lrs) == 0.5
    assert lrs[:10] == sorted(lrs[:10]) and lrs[10:] == sorted(lrs[10:], reverse=True)
    assert 0 < lrs[-1] < 0.001 and lrs[55] == pytest.approx(0.25)


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (30, 36)])
def test_muon_makes_updates_nearly_orthogonal(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    updates = train.orthogonalize(matrices)
    u, singular_values, v = torch.linalg.svd(updates, full_matrices=False)
    assert singular_values.min() > 0.3 and singular_values.max() < 1.3
    # Only the singular values change, each matrix's own: its singular vectors stay what they were.
    torch.testing.assert_close((u.mT @ matrices @ v.mT).diagonal(dim1=1, dim2=2).sum(), matrices.svd()[1].sum())


def test_every_parameter_is_optimised_exactly_once(small_model):
    for kind in train.CHOICES["optimizer"]:
        optimizers = train.make_optimizers(small_model, kind, weight_decay=0.1)
        optimised = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, optimised)) == sorted(map(id, small_model.parameters()))


def test_automatic_precision_never_takes_bfloat16_where_the_cpu_emulates_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert train.choose_precision("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    assert train.choose_precision("auto", cpu) == torch.bfloat16
    assert train.choose_precision("float32", cpu) == torch.float32


def test_a_teacher_is_matched_where_the_answers_are_the_same(small_model, test_split):
    x = dataset.normalize(test_split[0][:16])
    logits = small_model(x)
    for temperature in (1.0, 4.0):
        targets = train.teacher_probabilities([small_model, small_model], x, temperature)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
        assert train.distillation_loss(logits, targets, temperature).abs() < 1e-5
        assert train.distillation_loss(logits.roll(1, dims=1) * 3, targets, temperature) > 1e-3


def test_a_model_learns_from_teachers_alone_and_resumes(run_config, stop_at_step, tmp_path, monkeypatch):
    options = dict(teacher=(TEACHER,), val_size=5000, teacher_weight=1.0, epochs=6)
    whole, parts = (run_config(output_dir=str(tmp_path / name), **options) for name in ("whole", "parts"))
    learned = load_checkpoint(train.train(whole))[1]
    assert learned["val_accuracy"] > 0.25  # no label was seen; guessing gives 0.1
    stop_at_step(7, signal.SIGINT)
    with pytest.raises(SystemExit):
        train.train(parts)
    monkeypatch.undo()
    train.train(parts, resume=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_a_teacher_that_saw_the_validation_images_is_refused(run_config, tmp_path):
    for changes in (dict(val_size=500, seed=1), dict(val_size=6000)):
        with pytest.raises(
            TrainingError, match="which would flatter it: give --val-size 0, or --val-size 5000 --seed 0"
        ):
            train.train(run_config(teacher=(TEACHER,), **changes))
    assert not (tmp_path / "run").exists()


def test_a_recipe_can_be_asked_for_without_its_teacher():
    given = vars(train.parse_flags(["--recipe", "taught", "--teacher"])[1])
    assert train.choose_settings(given)["teacher"] == ()
    assert train.choose_settings({"recipe": "taught"})["teacher"]


def test_every_default_is_a_flag_that_help_explains(run_script):
    text = " ".join(run_script("train.py", "--help").stdout.split())
    for name, (_, explanation) in DEFAULTS.items():
        assert f"--{name.replace('_', '-')}" in text
        assert explanation in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume"], "last.pt is not a file"),
        (["--evaluate", "nothing.pt"], "nothing.pt is not a file"),
        (["--num-heads", "5"], "multiple of num_heads"),
        (["--val-size", "3"], "--val-size 3"),
        (["--train-size", "3"], "--train-size 3"),
        (["--resume", "--evaluate", "a.pt"], "give one of them"),
        (["--teacher", "nothing.pt"], "nothing.pt is not a file"),
        (["--teacher", "checkpoints/best.pt"], "the teacher lies where this run saves"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--stem-blocks", "1", "1", "-1"], "--stem-blocks"),
    ],
)
def test_errors_are_one_clear_line(run_script, flags, words):
    result = run_script("train.py", *flags)
    assert result.returncode != 0 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_the_script_trains_resumes_tests_and_draws(run_script, data_dir, tmp_path):
    flags = ["--data-dir", data_dir, "--train-size", 500, "--val-size", 200, "--epochs", 1, "--device", "cpu"]
    small = ["--stem-dims", 4, 8, "--stem-blocks", 0, 0, 0, "--embed-dim", 16, "--num-heads", 2, "--depth", 1]
    result = run_script("train.py", *flags, *small, "--report-test")
    assert result.returncode == 0, result.stderr
    for words in ("training images as augmented", "validation split", "chooses nothing", "weighted avg", "Ankle boot"):
        assert words in result.stdout
    assert "500 training, 200 validation, 10,000 test images" in result.stdout
    made = {"best.pt", "last.pt", "history.csv", "curves.png", "confusion_matrix.png"}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == made
    with (tmp_path / "checkpoints" / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]

    finished = run_script("train.py", "--resume")
    assert finished.returncode == 0 and "test accuracy" in finished.stdout
    assert not (tmp_path / "data").exists()  # the run's own data folder is used
    different = run_script("train.py", "--resume", "--lr", 0.5)
    assert different.returncode == 2 and "--lr 0.5 differs from the run to resume" in different.stderr


def test_the_shipped_checkpoint_beats_the_original(run_script, data_dir, tmp_path):
    copy = tmp_path / "model.pt"
    copy.write_bytes((ROOT / "checkpoints" / "shipped" / "model.pt").read_bytes())
    result = run_script("train.py", "--evaluate", copy, "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    summary = next(line for line in result.stdout.splitlines() if line.startswith("test accuracy"))
    assert float(summary.split()[2].rstrip(",")) > 0.95
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.pt",
        "history.csv",
        "curves.png",
        "confusion_matrix.png",
    }


def test_training_imports_neither_opencv_nor_pyplot():
    code = "import sys, train; assert 'cv2' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_the_teachers_of_a_recipe_are_there_and_were_chosen_on_validation_images(recipe):
    for path in train.choose_settings({"recipe": recipe})["teacher"]:
        checkpoint = load_checkpoint(ROOT / path)[1]
        assert checkpoint["train_config"]["val_size"] > 0
