import csv
import inspect
import io
import math
import os
import random
import re
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL_RUN, assert_identical, flags_of, state_of
from torchmetrics.functional.classification import multiclass_accuracy

import dataset
import train
from common.files import UserError, errors_in_one_line
from model import SHIPPED_CHECKPOINT, load_checkpoint, save_checkpoint
from training import processes, report, runs
from training.settings import choose_settings

# ---- The loss ------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A model whose answer is given."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits[: len(x)]


ROWS = np.random.default_rng(0).normal(size=(4, 3, 10)) * 2  # four models' logits of three images
MODEL, *TEACHERS = (Fixed(*rows.tolist()) for rows in ROWS)
X, LABELS = torch.zeros(3, 1, 28, 28), torch.tensor([4, 0, 9])


def log_softmax(rows):
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def loss_settings(**changes):
    plain = dict(precision="float32", label_smoothing=0.0, teacher_weight=0.9, temperature=1.0)
    return SimpleNamespace(**plain | changes)


def cross_entropy(smoothing):
    """Of the first model, by the formula: the right class has 1 - smoothing of the target, and
    every class a tenth.
    """
    target = (1 - smoothing) * np.eye(10)[LABELS.numpy()] + smoothing / 10
    return -(target * log_softmax(ROWS[0])).sum(axis=1).mean()


def divergence(teachers, temperature):
    """Kullback and Leibler's, of the teachers' mean softened answer from the first model's."""
    p = np.mean([np.exp(log_softmax(rows / temperature)) for rows in teachers], axis=0)
    return (p * (np.log(p) - log_softmax(ROWS[0] / temperature))).sum(axis=1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_cross_entropy_against_smoothed_labels(smoothing):
    loss, logits = train.training_loss(
        MODEL, [], X, LABELS, loss_settings(label_smoothing=smoothing)
    )
    assert loss.item() == pytest.approx(cross_entropy(smoothing), rel=1e-5)
    assert torch.equal(logits, MODEL.logits)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("weight", [0.9, 0.25, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_keep_their_part_beside_the_mean_of_the_teachers(count, weight, temperature):
    settings = loss_settings(label_smoothing=0.1, teacher_weight=weight, temperature=temperature)
    loss, _ = train.training_loss(MODEL, TEACHERS[:count], X, LABELS, settings)
    distance = divergence(ROWS[1 : 1 + count], temperature) * temperature**2
    assert loss.item() == pytest.approx(
        (1 - weight) * cross_entropy(0.1) + weight * distance, rel=1e-5
    )
    loss.backward()
    assert all(teacher.logits.grad is None for teacher in TEACHERS)
    MODEL.zero_grad()


class Matrix(nn.Module):
    """One matrix product, whose precision shows in its answer."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(784, 10, generator=torch.Generator().manual_seed(seed))
        )

    def forward(self, x):
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_model_and_teachers_compute_in_the_precision_asked_for(precision):
    x, dtype = (
        torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(2)),
        getattr(torch, precision),
    )
    model, teacher = Matrix(0), Matrix(1)
    expected = [
        (x.flatten(1).to(dtype) @ m.weight.detach().to(dtype)).double().numpy()
        for m in (model, teacher)
    ]
    settings = loss_settings(precision=precision, teacher_weight=1.0, temperature=8.0)
    loss, logits = train.training_loss(model, [teacher], x, LABELS, settings)
    assert logits.dtype == loss.dtype == model.weight.dtype == torch.float32
    np.testing.assert_allclose(logits.detach().numpy(), expected[0], rtol=1e-5, atol=1e-5)
    p, log_q = np.exp(log_softmax(expected[1] / 8)), log_softmax(expected[0] / 8)
    assert loss.item() == pytest.approx((p * (np.log(p) - log_q)).sum(axis=1).mean() * 64, rel=1e-3)


def test_predict_answers_in_evaluation_mode_and_leaves_the_mode(small_model, test_split):
    expected = small_model(dataset.normalize(test_split[0][:7]))
    small_model.train()
    logits = train.predict(small_model, test_split[0][:7], batch_size=3)
    assert small_model.training and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


# ---- The loop ------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """Keeps the arguments, by name, and the result of every call of a function."""

    def watch(module, name):
        function, calls = getattr(module, name), []
        signature = inspect.signature(function)

        def watched(*arguments, **options):
            result = function(*arguments, **options)
            calls.append((signature.bind(*arguments, **options).arguments, result))
            return result

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def splits_of(config):
    """Images and labels of the training and the validation split of a run."""
    images, labels = dataset.load(config.data_dir, train=True)
    train_index, val_index = dataset.split_indices(labels, config.val_size, config.seed)
    return images[train_index], labels[train_index], images[val_index], labels[val_index]


def history_of(folder):
    with (folder / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("train_size", [0, 200])
def test_an_epoch_has_each_training_image_once_with_its_label_in_an_order_of_its_own(
    run_config, watch, train_size
):
    config = run_config(flip=False, shift=0, erase=0.0, train_size=train_size, batch_size=50)
    calls = watch(train, "training_loss")
    train.train(config)
    images, labels, val_images, _ = splits_of(config)
    number = {
        image.tobytes(): i
        for i, image in enumerate(dataset.normalize(torch.cat([images, val_images])).numpy())
    }
    steps = (train_size or 400) // 50
    epochs = []
    for epoch in range(2):
        batches = [arguments for arguments, _ in calls[epoch * steps : (epoch + 1) * steps]]
        order = [number[image.tobytes()] for batch in batches for image in batch["x"].numpy()]
        # none of the validation images
        assert len(set(order)) == len(order) == steps * 50 and max(order) < 400
        assert torch.equal(torch.cat([batch["targets"] for batch in batches]), labels[order])
        epochs.append(order)
    assert len(calls) == 2 * steps and epochs[0] != epochs[1]
    if train_size:
        assert set(epochs[0]) == set(epochs[1])  # the same part of the images in every epoch
        assert labels[epochs[0]].bincount().tolist() == pytest.approx(
            (labels.bincount() / 2).tolist(), abs=1
        )


def test_images_left_over_wait_for_the_order_of_the_next_epoch(run_config, watch):
    calls = watch(train, "training_loss")
    train.train(run_config(train_size=25, batch_size=16))
    assert [len(arguments["targets"]) for arguments, _ in calls] == [16, 16]


def test_later_epochs_leave_out_a_part_of_the_easy_images(run_config, watch, tmp_path):
    calls, steps = watch(train, "training_loss"), watch(train, "take_step")
    config = run_config(flip=False, shift=0, erase=0.0, skip_easy=0.5, epochs=3, warmup_epochs=0.0)
    train.train(config)
    images, labels = splits_of(config)[:2]
    number = {image.tobytes(): i for i, image in enumerate(dataset.normalize(images).numpy())}
    order = [number[image.tobytes()] for arguments, _ in calls for image in arguments["x"].numpy()]
    # Of 160 images 96 are easy, and half of these are left out.
    first, second, third = set(order[:160]), order[160:272], order[272:]
    assert (
        len(first) == 160
        and len(set(second)) == len(second) == len(set(third)) == len(third) == 112
    )
    logits = torch.cat([result[1].detach() for _, result in calls]).double().numpy()
    losses = dict(
        zip(
            order[:160],
            -log_softmax(logits[:160])[np.arange(160), labels[order[:160]]],
            strict=True,
        )
    )
    hardest = sorted(losses, key=losses.get)[96:]
    assert set(hardest) <= set(second) < first
    losses |= dict(
        zip(second, -log_softmax(logits[160:272])[np.arange(112), labels[second]], strict=True)
    )
    assert set(sorted(losses, key=losses.get)[96:]) <= set(third) and set(third) != set(second)
    cosine = [config.lr * 0.5 * (1 + math.cos(math.pi * step / 24)) for step in range(24)]
    assert [arguments["lr"] for arguments, _ in steps] == pytest.approx(cosine)
    assert [row["images"] for row in history_of(tmp_path / "run")] == [160, 112, 112]


def test_images_that_the_first_epoch_did_not_reach_count_as_hard(run_config, watch):
    calls = watch(train, "training_loss")
    config = run_config(flip=False, shift=0, erase=0.0, train_size=25, batch_size=10, skip_easy=1.0)
    train.train(config)
    batches = [{image.tobytes() for image in arguments["x"].numpy()} for arguments, _ in calls]
    first, second = batches[0] | batches[1], batches[2]
    assert len(first) == 20 and len(second) == 10 and len(second - first) == 5


def test_the_warm_up_takes_at_most_a_quarter_of_the_steps(run_config, watch):
    calls = watch(train, "take_step")
    # 10 and 4 steps, of which 3.5 are a quarter
    train.train(run_config(lr=0.5, warmup_epochs=1.0, skip_easy=1.0))
    assert [arguments["lr"] for arguments, _ in calls][:5] == pytest.approx(
        [0.125, 0.25, 0.375, 0.5, 0.5]
    )


def test_the_warm_up_is_counted_in_epochs_of_the_first_ones_length(run_config, watch):
    calls = watch(train, "take_step")
    train.train(run_config(lr=0.5, warmup_epochs=0.4, skip_easy=1.0, epochs=3))  # 10, 4 and 4 steps
    assert [arguments["lr"] for arguments, _ in calls][:5] == pytest.approx(
        [0.125, 0.25, 0.375, 0.5, 0.5]
    )


def test_images_are_augmented_as_the_settings_say(run_config, watch):
    calls = watch(dataset, "augment")
    train.train(run_config(flip=False, shift=3, erase=0.75, erase_area=0.5, rotate=20.0, noise=0.2))
    asked = dict(flip=False, shift=3, erase=0.75, erase_area=0.5, rotate=20.0, noise=0.2)
    assert len(calls) == 20 and all(arguments | asked == arguments for arguments, _ in calls)
    variants = [result.numpy().tobytes() for _, result in calls]
    assert len(set(variants)) == 20


def test_alternate_flip_shows_each_image_the_other_way_in_the_next_epoch(run_config, watch):
    calls = watch(train, "training_loss")
    train.train(run_config(alternate_flip=True, shift=0, erase=0.0, train_size=0, batch_size=50))
    images = dataset.normalize(splits_of(run_config())[0]).numpy()
    number = {image.tobytes(): (i, False) for i, image in enumerate(images)}
    number |= {image[:, :, ::-1].tobytes(): (i, True) for i, image in enumerate(images)}
    seen = [number[image.tobytes()] for arguments, _ in calls for image in arguments["x"].numpy()]
    # in two epochs, each of 400 images as it is, and mirrored
    assert len(seen) == 800 and len(set(seen)) == 800
    assert 150 < sum(mirrored for _, mirrored in seen[:400]) < 250


def test_without_flips_no_image_is_mirrored_in_any_epoch(run_config, watch):
    calls = watch(train, "training_loss")
    train.train(
        run_config(flip=False, alternate_flip=True, shift=0, erase=0.0, train_size=0, batch_size=50)
    )
    images = {image.tobytes() for image in dataset.normalize(splits_of(run_config())[0]).numpy()}
    assert len(calls) == 16 and all(
        x.tobytes() in images for arguments, _ in calls for x in arguments["x"].numpy()
    )


def test_a_whitened_first_layer_knows_the_training_images_and_is_not_trained(
    run_config, watch, tmp_path
):
    calls = watch(train, "whiten_first_layer")
    train.train(run_config(output_dir=str(tmp_path / "other")))
    assert not calls
    train.train(run_config(whiten=True, train_size=0))
    assert torch.equal(calls[0][0]["x"], dataset.normalize(splits_of(run_config())[0]))
    conv, norm = load_checkpoint(tmp_path / "run" / "last.pt")[0].stem.first[0]
    # He's have other norms
    assert conv.weight.view(4, 9).norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(conv.weight[::2], -conv.weight[1::2])
    assert norm.weight.tolist() == [1.0] * 4 and norm.bias.tolist() == [0.0] * 4
    assert norm.running_mean.abs().min() > 0  # its statistics follow the images


def test_cutmix_gives_the_loss_mixed_targets_and_the_history_the_first_labels(
    run_config, watch, tmp_path
):
    calls = watch(train, "training_loss")
    plain, mixed = (
        run_config(epochs=1, cutmix=p, output_dir=str(tmp_path / str(p))) for p in (0.0, 1.0)
    )
    train.train(plain)
    labels = torch.cat([arguments["targets"] for arguments, _ in calls])
    calls.clear()
    train.train(mixed)
    targets = torch.cat([arguments["targets"] for arguments, _ in calls])
    assert targets.shape == (160, 10) and targets.sum(dim=1).tolist() == pytest.approx([1.0] * 160)
    shares = targets.gather(1, labels[:, None])[:, 0]  # both runs take the images in the same order
    assert 0.4 < shares.mean() < 0.65 and (shares < 0.99).float().mean() > 0.8
    logits = torch.cat([result[1] for _, result in calls])
    (row,) = history_of(tmp_path / "1.0")
    assert row["train_accuracy"] == pytest.approx(
        (logits.argmax(dim=1) == labels).double().mean().item()
    )


def test_the_model_is_in_training_mode_and_its_teacher_is_not(run_config, monkeypatch, tmp_path):
    teacher = train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher")))
    training_loss, modes = train.training_loss, []

    def noting(model, teachers, *arguments):
        modes.append((model.training, [teacher.training for teacher in teachers]))
        return training_loss(model, teachers, *arguments)

    monkeypatch.setattr(train, "training_loss", noting)
    train.train(run_config(teacher=(str(teacher),)))
    assert modes == [(True, [False])] * 20


def test_every_step_has_the_learning_rate_of_the_schedule(run_config, watch):
    calls = watch(train, "take_step")
    train.train(run_config(lr=0.5, warmup_epochs=1.0))
    # A whole epoch of warm-up would be half the run: it gets a quarter of the 20 steps.
    cosine = [0.25 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    assert [arguments["lr"] for arguments, _ in calls] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, *cosine]
    )
    # The averages of the first steps are short: step t keeps (1 + t) / (10 + t).
    assert [arguments["decay"] for arguments, _ in calls] == pytest.approx(
        [(1 + t) / (10 + t) for t in range(20)]
    )
    assert {arguments["grad_clip"] for arguments, _ in calls} == {1.0}


def test_a_shorter_warm_up_has_its_own_length(run_config, watch):
    calls = watch(train, "take_step")
    train.train(run_config(lr=0.5, warmup_epochs=0.2))
    assert [arguments["lr"] for arguments, _ in calls][:3] == pytest.approx([0.25, 0.5, 0.5])


def test_bfloat16_trains_too(run_config):
    checkpoint = load_checkpoint(train.train(run_config(precision="bfloat16", train_size=48)))[1]
    assert "bfloat16" in checkpoint["environment"]
    assert all(tensor.dtype != torch.bfloat16 for tensor in checkpoint["model"].values())
    assert math.isfinite(checkpoint["history"][-1]["train_loss"])


def test_losses_of_the_history_are_plain_cross_entropy_of_all_three_splits(
    run_config, watch, tmp_path
):
    teacher = train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher")))
    calls = watch(train, "training_loss")
    config = run_config(teacher=(str(teacher),), label_smoothing=0.3, epochs=1, report_test=True)
    model = load_checkpoint(train.train(config))[0]
    (row,) = history_of(tmp_path / "run")
    *_, val_images, val_labels = splits_of(config)
    test_images, test_labels = dataset.load(config.data_dir, train=False)
    answers = (
        torch.cat([result[1] for _, result in calls]),
        torch.cat([arguments["targets"] for arguments, _ in calls]),
    )
    expected = dict(train=answers, val=(train.predict(model, val_images), val_labels))
    expected["test"] = train.predict(model, test_images), test_labels
    for split, (logits, labels) in expected.items():
        loss = -log_softmax(logits.detach().double().numpy())[
            np.arange(len(labels)), labels.numpy()
        ].mean()
        assert row[f"{split}_loss"] == pytest.approx(loss, rel=1e-4)
        accuracy = multiclass_accuracy(logits, labels, num_classes=10, average="micro")
        assert row[f"{split}_accuracy"] == pytest.approx(accuracy.item())
    assert len(answers[1]) == 160 and list(row)[-1] == "seconds"


def test_the_kept_weights_are_the_averaged_ones(run_config, watch):
    calls = watch(train, "take_step")
    kept = load_checkpoint(train.train(run_config(epochs=1)))[1]["model"]
    last_step = calls[-1][0]
    assert_identical(kept, dict(last_step["ema"].state_dict()))
    assert not torch.equal(kept["head.weight"], last_step["model"].head.weight)


def test_without_averaging_the_kept_weights_are_the_models_own(run_config, watch):
    calls = watch(train, "take_step")
    kept = load_checkpoint(train.train(run_config(epochs=1, ema_decay=0.0)))[1]["model"]
    assert_identical(kept, dict(calls[-1][0]["model"].state_dict()))


def test_the_best_epoch_is_kept_and_of_equals_the_first(run_config, monkeypatch, tmp_path):
    summary, weights = report.summary, []
    # the test split chooses nothing
    accuracies = dict(val=iter([0.5, 0.7, 0.7, 0.6]), test=iter([0.1, 0.2, 0.3, 0.9]))

    def told(split, *arguments):
        told = {f"{split}_accuracy": next(accuracies[split])} if split in accuracies else {}
        return summary(split, *arguments) | told

    def save_run(run, row):
        weights.append({name: tensor.clone() for name, tensor in run.ema.state_dict().items()})
        original(run, row)

    original = runs.save_run
    with monkeypatch.context() as patch:
        patch.setattr(report, "summary", told)
        patch.setattr(runs, "save_run", save_run)
        best = load_checkpoint(train.train(run_config(epochs=4, report_test=True)))[1]
    assert best["epoch"] == 2
    assert_identical(best["model"], weights[1])
    # the whole run's
    assert [row["val_accuracy"] for row in best["history"]] == [0.5, 0.7, 0.7, 0.6]
    last = load_checkpoint(tmp_path / "run" / "last.pt")[1]
    assert last["epoch"] == 4
    assert_identical(last["model"], weights[3])
    finished, student = str(tmp_path / "run" / "best.pt"), str(tmp_path / "student")
    # whatever its best epoch was
    train.train(run_config(teacher=(finished,), epochs=1, output_dir=student))


def test_without_a_validation_split_the_latest_weights_are_kept_and_nothing_is_not_a_number(
    run_config, tmp_path, capsys
):
    best = load_checkpoint(train.train(run_config(val_size=0, quiet=False)))[1]
    last = load_checkpoint(tmp_path / "run" / "last.pt")[1]
    assert best["epoch"] == 2
    assert_identical(best["model"], last["model"])
    text = capsys.readouterr().out + (tmp_path / "run" / "history.csv").read_text()
    assert (
        "nan" not in text.lower() and "val_loss" not in text and "train split, as augmented" in text
    )


def test_the_screen_and_the_table_show_the_same_seconds_of_all_parts_of_a_run(
    run_config, stop, monkeypatch, capsys, tmp_path
):
    times = iter(range(0, 10_000, 100))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    stop(14)
    with pytest.raises(KeyboardInterrupt):
        train.train(run_config())
    train.train(run_config(), resume=True)
    out = capsys.readouterr().out
    assert [row["seconds"] for row in history_of(tmp_path / "run")] == [100, 200]
    assert (
        "2 images/s  elapsed 0:01:40  remaining 0:01:40" in out
        and "elapsed 0:03:20  remaining 0:00:00" in out
    )


def test_model_and_teachers_are_compiled_if_that_is_asked_for(
    run_config, watch, monkeypatch, tmp_path
):
    teacher = str(train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher"))))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, losses = watch(torch, "compile"), watch(train, "training_loss")
    for compile_them in (True, False):
        options = dict(compile=compile_them, output_dir=str(tmp_path / str(compile_them)))
        train.train(run_config(teacher=(teacher,), epochs=1, train_size=32, **options))
    assert [arguments["dynamic"] for arguments, _ in compiled] == [False, False]
    used = [arguments for arguments, _ in losses]
    assert [used[0]["model"], *used[0]["teachers"]] == [network for _, network in compiled]
    assert not any(
        hasattr(network, "_orig_mod") for network in (used[-1]["model"], *used[-1]["teachers"])
    )
    assert_identical(state_of(tmp_path / "True")["model"], state_of(tmp_path / "False")["model"])


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_steps_are_recorded_only_by_the_recipes_for_a_gpu(recipe):
    config = choose_settings(train.SETTINGS, train.RECIPES, dict(recipe=recipe))
    assert config.cuda_graph == (recipe in ("teacher", "record"))


def test_a_new_field_of_the_model_without_a_setting_is_named(run_config, monkeypatch):
    config = run_config()
    del config.mlp_ratio
    with pytest.raises(
        UserError,
        match="ModelConfig has the field mlp_ratio: give it a row of this name in SETTINGS",
    ):
        train.train(config)


def test_a_weight_that_an_edited_optimizer_leaves_out_is_named(run_config, monkeypatch):
    def edited(model, *_):
        return [torch.optim.SGD(model.head.parameters(), lr=0.0)]

    monkeypatch.setattr(train, "make_optimizers", edited)
    with pytest.raises(UserError, match=r"gives pos_embed to 0 optimizers: give each trainable"):
        train.train(run_config())


def test_a_test_file_that_is_missing_is_found_before_the_training(
    run_config, small_data, monkeypatch, tmp_path
):
    for path in small_data.glob("train-*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no good copy of t10k-images-idx3-ubyte"):
        train.train(run_config(data_dir=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_a_column_of_the_history_may_be_a_list_or_an_array(run_config, monkeypatch, tmp_path):
    train_epoch = train.train_epoch

    def with_columns(run, epoch):
        own = dict(class_accuracy=[0.1, 0.2], norms=torch.ones(2), norm=torch.tensor(0.5))
        return train_epoch(run, epoch) | own

    monkeypatch.setattr(train, "train_epoch", with_columns)
    best = load_checkpoint(train.train(run_config(epochs=1)))[1]
    columns = [best["history"][0][name] for name in ("class_accuracy", "norms", "norm")]
    assert columns == [[0.1, 0.2], [1.0, 1.0], 0.5]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(val_size=9), "--val-size 9: give 0, or 10 to 490"),
        (dict(val_size=491), "--val-size 491: give 0, or 10 to 490"),
        (dict(train_size=9), "--train-size 9: give 0, or 10 to 390"),
        (dict(train_size=391), "--train-size 391: give 0, or 10 to 390"),
        (dict(batch_size=161), "--batch-size 161: give at most 160"),
        (dict(num_heads=3), "multiple of num_heads"),
        (dict(teacher=("nothing.pt",)), "cannot read nothing.pt"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run_config, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        train.train(run_config(**changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# ---- Seeds and interruptions ---------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_seed_and_threads_give_the_same_weights(run_config, tmp_path, threads):
    for name in ("one", "two"):
        torch.rand(3)  # whatever happens in between
        train.train(
            run_config(output_dir=str(tmp_path / name), threads=threads, train_size=48, epochs=1)
        )
    torch.set_num_threads(1)
    assert_identical(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    assert f"{threads} CPU threads" in state_of(tmp_path / "one")["environment"]


def test_another_seed_has_another_split_and_another_start(run_config, watch):
    parts, models = watch(train, "load_data"), watch(train, "make_optimizers")
    for seed in (0, 1):
        train.train(run_config(seed=seed, lr=0.0, epochs=1))
    # of the 160 of each
    assert len(set(parts[0][1][2].tolist()) & set(parts[1][1][2].tolist())) < 100
    assert not torch.equal(models[0][0]["model"].head.weight, models[1][0]["model"].head.weight)


def test_every_source_of_randomness_follows_from_seed_epoch_and_process(
    run_config, monkeypatch, tmp_path
):
    training_loss, drawn = train.training_loss, []

    def drawing(model, teachers, x, targets, config):
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random(), x.sum().item()))
        return training_loss(model, teachers, x, targets, config)

    monkeypatch.setattr(train, "training_loss", drawing)
    for seed, rank in ((0, 0), (0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        # a step an epoch
        train.train(
            run_config(seed=seed, train_size=16, output_dir=str(tmp_path / f"{seed}{rank}"))
        )
    once, again, other_seed, other_process = (drawn[i : i + 2] for i in range(0, 8, 2))
    assert once == again
    for source in range(3):
        assert len({row[source] for row in (*once, *other_seed, *other_process)}) == 6
    # all augment the same whole batch
    assert [row[3] for row in once] == [row[3] for row in other_process]


def test_which_images_are_mirrored_first_depends_on_the_seed(run_config, watch, tmp_path):
    calls = watch(dataset, "alternate_flip")
    for seed in (0, 1):
        train.train(
            run_config(
                alternate_flip=True, seed=seed, epochs=1, output_dir=str(tmp_path / str(seed))
            )
        )
    first, second = (result for _, result in calls)
    assert 0.3 < (first != second).flatten(1).any(dim=1).float().mean() < 0.7


@pytest.fixture
def stop(monkeypatch):
    """Raises an exception, or calls a function, after this many steps."""

    def stop(at, what=KeyboardInterrupt):
        take_step, calls = train.take_step, []

        def counting(*arguments):
            take_step(*arguments)
            calls.append(1)
            if len(calls) == at:
                if isinstance(what, type):
                    raise what
                what(*arguments)

        monkeypatch.setattr(train, "take_step", counting)

    return stop


@pytest.mark.parametrize(
    "changes",
    [
        dict(alternate_flip=True, skip_easy=0.5, whiten=True),
        dict(cutmix=0.5, optimizer="adamw", val_size=0, report_test=True),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    run_config, stop, tmp_path, changes
):
    options = changes | dict(epochs=3)
    whole, parts = (
        run_config(output_dir=str(tmp_path / name), **options) for name in ("whole", "parts")
    )
    train.train(whole)
    for step in (13, 3):  # in the second epoch; then, in the run that goes on, in the second again
        stop(step)
        with pytest.raises(KeyboardInterrupt):
            train.train(parts, resume=step == 3)
        assert len(load_checkpoint(tmp_path / "parts" / "last.pt")[1]["history"]) == 1
        torch.rand(5)
    stop(1000)
    train.train(parts, resume=True)
    for name in ("last.pt", "best.pt"):
        assert_identical(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))
    files = [
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "parts")
    ]
    assert files[0] == files[1] == ["best.pt", "history.csv", "last.pt"]


@pytest.mark.parametrize("killed", ["best.pt", "last.pt", "history.csv"])
def test_a_run_killed_between_two_files_of_an_epoch_repeats_it_bit_for_bit(
    run_config, monkeypatch, tmp_path, killed
):
    whole, parts = (
        run_config(output_dir=str(tmp_path / name), val_size=0) for name in ("whole", "parts")
    )
    train.train(whole)
    with monkeypatch.context() as patch:
        for name in ("save_checkpoint", "write_history"):
            calls, original = [], getattr(runs, name)

            def save(*arguments, original=original, calls=calls, **contents):
                path = next(argument for argument in arguments if hasattr(argument, "name"))
                calls.append(path)
                if path.name == killed and calls.count(path) == 2:
                    raise KeyboardInterrupt
                original(*arguments, **contents)

            patch.setattr(runs, name, save)
        with pytest.raises(KeyboardInterrupt):
            train.train(parts)
    train.train(parts, resume=True)
    for name in ("last.pt", "best.pt"):
        assert_identical(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))
    assert [row["epoch"] for row in history_of(tmp_path / "parts")] == [1, 2]


def test_runs_killed_between_best_and_last_lose_nothing(run_config, monkeypatch, tmp_path):
    # Each is killed in its first epoch, once best.pt is there.
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_history", lambda *_: os.abort())
        patch.setattr(os, "abort", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        for seed in range(3):
            with pytest.raises(KeyboardInterrupt):
                train.train(run_config(seed=seed))
            kept.append((tmp_path / "run" / "best.pt").read_bytes())
    for number, content in zip((1, 2), kept, strict=False):
        assert (tmp_path / "run" / f"previous-{number}-best.pt").read_bytes() == content


@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_best_checkpoint_is_made_again(run_config, monkeypatch, stop, tmp_path, finished):
    summary, accuracies = report.summary, iter([0.9, 0.5, 0.4, 0.9, 0.5, 0.4])

    def told(split, *arguments):
        told = dict(val_accuracy=next(accuracies)) if split == "val" else {}
        return summary(split, *arguments) | told

    monkeypatch.setattr(report, "summary", told)
    config = run_config(epochs=3)
    best = train.train(config)
    expected = state_of(tmp_path / "run", "best.pt")
    assert expected["epoch"] == 1
    if not finished:
        stop(25)  # in the third epoch
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
        stop(1000)
    best.unlink()
    train.train(config, resume=True)
    assert_identical(state_of(tmp_path / "run", "best.pt"), expected)


def poison_the_loss(monkeypatch, at):
    training_loss, calls = train.training_loss, []

    def poisoned(*arguments):
        calls.append(1)
        loss, logits = training_loss(*arguments)
        return (loss, logits * math.nan) if len(calls) == at else (loss, logits)

    monkeypatch.setattr(train, "training_loss", poisoned)


@pytest.mark.parametrize("kind", ["loss", "weight"])
def test_what_is_no_longer_finite_is_never_saved(run_config, monkeypatch, stop, tmp_path, kind):
    def break_a_weight(model, ema, *_):
        ema.head.weight.data[0, 0] = math.inf  # the epoch's losses were all finite

    if kind == "loss":
        poison_the_loss(monkeypatch, at=13)
    else:
        stop(20, break_a_weight)
    with pytest.raises(
        UserError, match=r"became infinite or NaN in epoch 2, not saved: lower --lr from 0\.008"
    ):
        train.train(run_config(val_size=0))
    for name in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(tmp_path / "run" / name)[1]
        assert checkpoint["epoch"] == len(checkpoint["history"]) == 1
        assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_a_run_that_fails_in_its_first_epoch_leaves_an_earlier_one_alone(
    run_config, monkeypatch, tmp_path
):
    train.train(run_config(epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    poison_the_loss(monkeypatch, at=5)
    with pytest.raises(UserError, match="became infinite or NaN in epoch 1"):
        train.train(run_config(epochs=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_earlier_runs_are_put_aside_and_nothing_is_overwritten(run_config, tmp_path):
    kept, run = [], tmp_path / "run"
    for seed in range(3):
        kept.append(train.train(run_config(epochs=1, seed=seed)).read_bytes())
        (run / "best_curves.png").write_text(f"curves of {seed}")
        (run / "notes.txt").write_text("a person's own")
    for i, prefix in enumerate(("previous-1-", "previous-2-", "")):
        assert (run / f"{prefix}best.pt").read_bytes() == kept[i]
        assert (run / f"{prefix}best_curves.png").read_text() == f"curves of {i}"
        assert (run / f"{prefix}last.pt").exists() and (run / f"{prefix}history.csv").exists()
    assert (run / "notes.txt").read_text() == "a person's own" and len(
        list(run.iterdir())
    ) == 3 * 4 + 1


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with runs.reserve_folder(folder):
        (folder / ".best.pt.123.part").touch()
        with pytest.raises(
            UserError, match=r"another run is writing to .*: give this one another --output-dir"
        ):
            with runs.reserve_folder(folder):
                pass
        assert (folder / ".best.pt.123.part").exists()
    with runs.reserve_folder(folder):
        assert not list(folder.glob("*.part"))  # of a run that was killed while it saved
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*; choose another --output-dir"):
        with runs.reserve_folder(tmp_path / "a file" / "run"):
            pass


# ---- Teachers ------------------------------------------------------------------------------------


def test_a_model_that_learns_from_a_teacher_resumes_bit_for_bit(run_config, stop, tmp_path):
    teacher = train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher")))
    options = dict(teacher=(str(teacher),), teacher_weight=1.0, temperature=2.0)
    whole, parts = (
        run_config(output_dir=str(tmp_path / name), **options) for name in ("whole", "parts")
    )
    train.train(whole)
    stop(15)
    with pytest.raises(KeyboardInterrupt):
        train.train(parts)
    stop(1000)
    train.train(parts, resume=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_a_model_learns_from_labels_and_another_from_it_alone(run_config, tmp_path):
    options = dict(train_size=0, batch_size=40, epochs=6, drop_path=0.0, erase=0.0, ema_decay=0.9)
    teacher = train.train(run_config(output_dir=str(tmp_path / "teacher"), **options))
    config = run_config(teacher=(str(teacher),), teacher_weight=1.0, **options)
    images, labels = splits_of(config)[2:]
    answers = [
        train.predict(load_checkpoint(path)[0], images).argmax(dim=1)
        for path in (teacher, train.train(config))
    ]
    assert all((answer == labels).float().mean() > 0.3 for answer in answers)  # guessing gives 0.1
    assert (answers[0] == answers[1]).float().mean() > 0.6


def test_another_teacher_in_its_place_is_refused_on_resume(run_config, stop, tmp_path):
    folder = tmp_path / "teacher"
    teacher = train.train(run_config(epochs=1, output_dir=str(folder)))
    config = run_config(teacher=(str(teacher),))
    stop(15)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    stop(1000)
    first = teacher.read_bytes()
    train.train(run_config(epochs=1, lr=0.1, output_dir=str(folder)))
    with pytest.raises(
        UserError, match="the teacher is not the one that the run began with: put that one back"
    ):
        train.train(config, resume=True)
    teacher.write_bytes(first)
    teacher.rename(tmp_path / "moved.pt")
    train.train(run_config(teacher=(str(tmp_path / "moved.pt"),)), resume=True)


def test_a_teacher_that_says_nonsense_of_its_training_is_refused(run_config, small_model, tmp_path):
    for saw in (dict(epochs="many"), dict(val_size=0.5), dict(seed=None)):
        save_checkpoint(tmp_path / "teacher.pt", small_model, train_config=saw)
        with pytest.raises(
            UserError,
            match=r"teacher\.pt does not say what it was trained on: name another teacher",
        ):
            train.train(run_config(teacher=(str(tmp_path / "teacher.pt"),)))


def test_a_teacher_that_saw_validation_images_is_refused(run_config, tmp_path):
    saw_some = train.train(run_config(epochs=1, output_dir=str(tmp_path / "some")))
    saw_all = train.train(run_config(epochs=1, val_size=0, output_dir=str(tmp_path / "all")))
    for path, changes, advice in (
        (saw_some, dict(seed=1), "give --val-size 0, or --val-size 100 --seed 0 as it had"),
        (saw_some, dict(val_size=150), "give --val-size 0, or --val-size 100 --seed 0 as it had"),
        (saw_all, {}, "give --val-size 0$"),
    ):
        with pytest.raises(
            UserError, match=f"trained on images that this run validates on: {advice}"
        ):
            train.train(run_config(teacher=(str(path),), **changes))
    for path, changes in ((saw_some, {}), (saw_all, dict(val_size=0))):
        train.train(run_config(teacher=(str(path),), epochs=1, **changes))


def test_a_default_teacher_needs_no_parentheses(data_dir, monkeypatch):
    labels = dataset.load(data_dir, train=True)[1]
    monkeypatch.setitem(
        train.SETTINGS, "teacher", (str(SHIPPED_CHECKPOINT), None, "a student's edit")
    )
    config = choose_settings(train.SETTINGS, train.RECIPES, dict(val_size=0))
    assert len(runs.load_teachers(config, labels, torch.device("cpu"))) == 1


def test_a_teacher_whose_run_was_stopped_is_refused(run_config, stop, tmp_path):
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        train.train(run_config(output_dir=str(tmp_path / "teacher")))
    learn = run_config(teacher=(str(tmp_path / "teacher" / "best.pt"),), epochs=1)
    with pytest.raises(
        UserError, match=r"best\.pt is from a run that stopped after 1 of 2 epochs: finish it with"
    ):
        train.train(learn)
    train.train(run_config(output_dir=str(tmp_path / "teacher")), resume=True)
    train.train(learn)


def test_a_teacher_that_lies_where_the_run_saves_is_refused(run_config, monkeypatch, tmp_path):
    # It would be put aside, and a resumed run would learn from its own best epoch instead.
    teacher = train.train(run_config(epochs=1))
    monkeypatch.chdir(teacher.parent)
    for path in (str(teacher), "best.pt"):
        with pytest.raises(UserError, match=r"the teacher .*best.pt lies where this run saves"):
            train.train(run_config(teacher=(path,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_the_replayed_steps_are_the_steps(run_config, tmp_path):
    options = dict(
        device="cuda",
        cutmix=0.5,
        rotate=15.0,
        noise=0.1,
        drop_path=0.1,
        precision="float32",
        lr=1e-3,
    )
    options["whiten"] = True
    train.train(run_config(**options))
    train.train(run_config(**options, cuda_graph=False, output_dir=str(tmp_path / "plain")))
    for replayed, plain in zip(
        history_of(tmp_path / "run"), history_of(tmp_path / "plain"), strict=True
    ):
        assert replayed["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_the_record_learns_from_the_teacher_of_the_other_recipe(data_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # small ones for the test
    shape = dict(stem_dims=(8, 8), embed_dim=8, num_heads=2, stem_blocks=(0, 0, 0))
    small = (
        SMALL_RUN
        | shape
        | dict(data_dir=str(data_dir), train_size=20, val_size=0, batch_size=10, epochs=1)
    )
    with pytest.raises(
        UserError,
        match=r"best\.pt is missing: first run .* --recipe teacher --output-dir checkpoints/teach",
    ):
        train.train(choose_settings(train.SETTINGS, train.RECIPES, small | dict(recipe="record")))
    # the recipe would not make this one
    with pytest.raises(UserError, match=r"cannot read other\.pt"):
        train.train(
            choose_settings(
                train.SETTINGS, train.RECIPES, small | dict(recipe="record", teacher=("other.pt",))
            )
        )
    given = small | dict(recipe="teacher", output_dir="checkpoints/teacher")
    train.train(choose_settings(train.SETTINGS, train.RECIPES, given))
    trained = train.train(
        choose_settings(train.SETTINGS, train.RECIPES, small | dict(recipe="record"))
    )
    assert load_checkpoint(trained)[1]["train_config"]["teacher"] == (
        "checkpoints/teacher/best.pt",
    )


# ---- The command line ----------------------------------------------------------------------------


@pytest.fixture
def flags(small_data):
    return [*flags_of(SMALL_RUN), "--data-dir", str(small_data)]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(main, flags, stop, capsys, tmp_path, number, status):
    whole, parts = tmp_path / "whole", tmp_path / "the parts"
    assert main(*flags, "--output-dir", whole) == 0
    stop(12, lambda *_: os.kill(os.getpid(), number))
    assert main(*flags, "--output-dir", parts) == status
    command = f"python train.py --resume --output-dir '{parts}'"
    assert command in capsys.readouterr().out.splitlines()[-1]
    stop(1000)
    assert main("--resume", "--output-dir", parts, "--device", "auto") == 0
    assert_identical(state_of(whole), state_of(parts))
    assert "test accuracy" in capsys.readouterr().out


def test_a_run_stopped_in_its_first_epoch_has_saved_nothing_and_says_so(
    main, flags, stop, capsys, tmp_path
):
    stop(3)
    assert main(*flags) == 130
    output = capsys.readouterr()
    assert "no epoch was finished, so nothing was saved" in output.out.splitlines()[-1]
    assert output.err.splitlines()[-1] == "train.py: interrupted"
    assert not list((tmp_path / "checkpoints").glob("[!.]*"))


def test_a_run_stopped_in_its_first_epoch_does_not_advise_to_resume_an_earlier_one(
    main, flags, stop, capsys
):
    assert main(*flags) == 0
    stop(3)
    assert main(*flags, "--seed", 5) == 130
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert (
        "no epoch was finished, so nothing was saved; checkpoints/last.pt is of an earlier run"
        in last_line
    )


def test_a_clock_that_was_set_back_does_not_hide_what_was_saved(
    main, flags, stop, monkeypatch, capsys, tmp_path
):
    assert main(*flags, "--epochs", 1) == 0  # an earlier run
    save_run = runs.save_run

    def saving(run, row):
        save_run(run, row)
        os.utime(run.folder / "last.pt", (1e9, 1e9))  # in 2001

    monkeypatch.setattr(runs, "save_run", saving)
    stop(12)
    assert main(*flags) == 130
    assert "go on from the last whole epoch with" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("again", [[], ["--resume"]])
def test_the_same_command_goes_on_after_a_failure(
    main, flags, stop, monkeypatch, capsys, tmp_path, again
):
    # torchrun starts a failed command again; a queue that does so may always give --resume.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(*flags, "--output-dir", whole) == 0
    stop(12, RuntimeError)
    command = [*flags, "--output-dir", parts, *again]
    with pytest.raises(RuntimeError):
        main(*command)
    assert (
        f"there is no run to resume in {parts}: starting one" in capsys.readouterr().out
    ) == bool(again)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0" if again else "1")
    stop(3, RuntimeError)  # and again, before anything new is saved
    with pytest.raises(RuntimeError):
        main(*command)
    stop(1000)
    assert main(*command) == 0
    assert capsys.readouterr().out.count("after epoch 1 of 2") == 2
    assert_identical(state_of(whole), state_of(parts))


def test_a_restart_does_not_go_on_with_an_earlier_run(main, flags, stop, monkeypatch, capsys):
    assert main(*flags) == 0
    stop(3, RuntimeError)  # before anything is saved
    with pytest.raises(RuntimeError):
        main(*flags)
    stop(1000)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(*flags) == 0
    out = capsys.readouterr().out
    assert "going on with" not in out and "epoch 1/2" in out


def test_a_folder_that_another_run_has_is_refused(main, flags, tmp_path):
    with runs.reserve_folder(tmp_path / "busy"):
        assert "another run is writing to busy" in main(*flags, "--output-dir", "busy")
    assert main(*flags, "--epochs", 1, "--output-dir", "busy") == 0


def test_a_run_whose_folder_has_moved_goes_on_where_it_lies(main, flags, stop, tmp_path):
    stop(12)
    assert main(*flags, "--output-dir", "elsewhere") == 130
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    stop(1000)
    assert main("--resume") == 0
    assert not (tmp_path / "elsewhere").exists()


def test_other_peoples_files_stay_where_they_are(main, flags, tmp_path):
    names = ("best_ideas.txt", "best_friend.png", "last_year.png", ".download.part")
    notes = [tmp_path / "checkpoints" / name for name in names]
    notes[0].parent.mkdir()
    for note in notes:
        note.write_text("mine")
    assert main(*flags) == main(*flags) == 0
    assert all(note.read_text() == "mine" for note in notes)


def test_every_stream_of_randomness_is_its_own():
    numbers = [
        (seed, epoch, *rank) for seed in range(3) for epoch in range(3) for rank in ((), (1,), (2,))
    ]
    assert len({train.seed_for(*row) for row in numbers}) == len(numbers)


def test_a_run_trains_tests_and_draws_and_a_finished_one_is_tested_again(
    main, flags, capsys, tmp_path
):
    assert main(*flags, "--no-quiet", "--epochs", 1, "--report-test") == 0
    out = capsys.readouterr().out
    for words in (
        "160 training images, processes: 1",
        "train split, as augmented",
        "val split",
        "test split",
    ):
        assert words in out
    assert out.count("chooses nothing") == 1 and out.count("test accuracy") == 1
    made = {"best.pt", "last.pt", "history.csv", "best_curves.png", "best_confusion_matrix.png"}
    assert {path.name for path in (tmp_path / "checkpoints").glob("[!.]*")} == made
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    assert main("--resume") == 0
    out = capsys.readouterr().out
    assert "going on with checkpoints/last.pt after epoch 1 of 1" in out and "test accuracy" in out
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


def test_weights_alone_are_no_run_to_resume(main, flags, tmp_path):
    assert main(*flags, "--epochs", 1) == 0
    shutil.copy(tmp_path / "checkpoints" / "best.pt", tmp_path / "checkpoints" / "last.pt")
    assert "last.pt holds weights, but no run to resume: start without --resume" in main("--resume")


def test_a_run_that_contradicts_itself_is_not_resumed(main, flags, tmp_path):
    assert main(*flags, "--epochs", 1) == 0
    last = tmp_path / "checkpoints" / "last.pt"
    good = torch.load(last, weights_only=True)
    deeper = good["train_config"] | dict(depth=1)
    for changes in (
        dict(training=5),
        dict(train_config=deeper),
        dict(history=[]),
        dict(history=[dict(epoch=1)]),
    ):
        torch.save(good | changes, last)
        assert "last.pt does not fit its own settings: start without" in main("--resume")


def test_a_run_with_other_settings_is_not_resumed(main, flags, monkeypatch, tmp_path):
    assert main(*flags, "--epochs", 1) == 0
    for change in (
        ["--lr", 0.5],
        ["--threads", 3],
        ["--stem-dims", 4, 16],
        ["--no-flip"],
    ):
        assert f"{change[0].replace('--no-', '--')} " in main("--resume", *change)
    (tmp_path / "moved").symlink_to(flags[-1])
    assert (
        main("--resume", "--data-dir", "moved", "--threads", 0, "--lr", 0.008, "--stem-dims", 4, 8)
        == 0
    )
    monkeypatch.setitem(train.SETTINGS, "mix", (0.2, (0.0, 1.0), "a new row"))
    assert "differ in their settings, --mix: start a new run" in main("--resume")


def test_an_evaluation_writes_two_pictures_beside_the_checkpoint_and_nothing_else(
    main, flags, capsys, tmp_path
):
    assert main(*flags, "--epochs", 1) == 0
    best, here = tmp_path / "checkpoints" / "best.pt", tmp_path / "here"
    here.mkdir()
    (here / "a model.pt").write_bytes(best.read_bytes())
    (here / "history.csv").write_text("another run's")
    (here / "best_curves.png").write_text("another model's")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    capsys.readouterr()
    assert (
        main(
            "--evaluate",
            here / "a model.pt",
            "--data-dir",
            flags[-1],
            "--threads",
            1,
            "--device",
            "cpu",
        )
        == 0
    )
    made = {path.name for path in here.iterdir()} - before.keys()
    assert made == {"a model_curves.png", "a model_confusion_matrix.png"}
    assert {name: (here / name).read_bytes() for name in before} == before
    images, labels = dataset.load(flags[-1], train=False)
    predictions = train.predict(load_checkpoint(best)[0], images).argmax(dim=1)
    accuracy = multiclass_accuracy(predictions, labels, num_classes=10, average="micro").item()
    out = capsys.readouterr().out
    assert (
        f"test accuracy {accuracy:.4f}, loss " in out and "100 images, one forward pass each" in out
    )
    assert report.class_report(labels, predictions) in out


def test_an_evaluation_works_in_a_read_only_folder(main, flags, monkeypatch, capsys):
    assert main(*flags, "--epochs", 1) == 0

    def refuse(path):
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr(report, "whole_file", refuse)
    capsys.readouterr()
    assert main("--evaluate", "checkpoints/best.pt", "--data-dir", flags[-1], "--threads", 1) == 0
    out = capsys.readouterr().out
    assert (
        "test accuracy" in out
        and "note: no pictures: cannot write checkpoints/best_curves.png" in out
    )


def test_an_evaluation_refuses_flags_that_it_does_not_use(main):
    error = main("--evaluate", "a.pt", "--lr", 0.1, "--seed", 1, "--resume")
    assert error == "train.py: error: --evaluate does not use --lr, --seed, --resume: leave it out"


def test_paths_may_begin_with_the_home_folder(main, flags, small_data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").symlink_to(small_data)
    own = [*flags[:-2], "--data-dir=~/x", "--epochs", 1]
    assert main(*own, "--output-dir=~/run") == 0
    assert main(*own, "--output-dir", "~/other", "--teacher", "~/run/best.pt") == 0
    assert main("--resume", "--output-dir=~/run") == 0
    assert main("--evaluate=~/run/best.pt", "--data-dir", "~/x", "--threads", 1) == 0
    assert not (tmp_path / "~").exists() and (tmp_path / "other" / "best.pt").exists()


def test_a_run_outlives_its_output(main, flags, monkeypatch, capsys, tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(*flags) == 0
    assert len(history_of(tmp_path / "checkpoints")) == 2
    assert "some of the output could not be written" in capsys.readouterr().err


def test_settings_that_change_nothing_say_so(main, flags, capsys):
    assert (
        main(
            *flags,
            "--epochs",
            1,
            "--erase",
            0,
            "--erase-area",
            0.5,
            "--temperature",
            2,
            "--ema-decay",
            0.99,
        )
        == 0
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: --erase-area changes nothing without --erase",
        "note: --temperature changes nothing without --teacher",
        # The tenth step keeps at most (1 + 9) / (10 + 9) of the average.
        "note: in a run of 10 steps an --ema-decay above 0.5263 changes nothing: "
        "the average starts short",
    ]
    assert main(*flags, "--epochs", 1, "--ema-decay", 0.5, "--erase-area", 0.5) == 0
    assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--epochs", "0"], "--epochs 0: give a whole number of at least 1"),
        (["--lr", "inf"], "--lr inf: give a number of at least 0.0"),
        (["--recipe", "slow"], "--recipe slow: give one of default, fast, teacher, record"),
        (
            ["--num-heads", "5", "--embed-dim", "96"],
            "embed_dim 96 is not a multiple of num_heads 5",
        ),
        (["--evaluate", "nothing.pt"], "cannot read nothing.pt"),
    ],
)
def test_what_a_user_can_mend_is_one_line(main, flags, capsys, words, expected):
    evaluation = "--evaluate" in words
    error = main(*([] if evaluation else flags), *words)
    assert error.startswith("train.py: error: ") and expected in error and "\n" not in error


def test_a_default_edited_to_what_is_not_allowed_is_one_line(main, monkeypatch):
    monkeypatch.setitem(train.SETTINGS, "lr", (-1.0, *train.SETTINGS["lr"][1:]))
    assert main() == "train.py: error: --lr -1.0: give a number of at least 0.0"


def test_a_bug_keeps_its_traceback(main, flags, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda *_: [][0])
    with pytest.raises(IndexError):
        main(*flags)
    for bug in (ValueError("a bug"), RuntimeError("a bug"), OSError("a bug")):
        with pytest.raises(type(bug), match="a bug"), errors_in_one_line("a script"):
            raise bug
    with (
        pytest.raises(SystemExit, match=r"^a script: error: one line$"),
        errors_in_one_line("a script"),
    ):
        raise UserError("one\n line")


def test_every_setting_is_a_flag_that_help_explains(main, capsys):
    assert main("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, _, meaning) in train.SETTINGS.items():
        assert f"--{name.replace('_', '-')}" in text and " ".join(meaning.split()) in text
    assert "--pool attention|mean how 49 tokens" in text and "--stem-dims N N " in text


@pytest.mark.slow
def test_the_shipped_checkpoint_has_the_accuracy_of_the_readme_and_the_tables(
    main, data_dir, tmp_path, capsys
):
    (tmp_path / "model.pt").write_bytes(SHIPPED_CHECKPOINT.read_bytes())
    assert main("--evaluate", "model.pt", "--data-dir", data_dir, "--threads", 1) == 0
    with open(ROOT / "benchmarks" / "seeds.csv", newline="") as file:
        (row,) = [
            row for row in csv.DictReader(file) if "record" in row["command"] and row["seed"] == "0"
        ]
    printed = re.search(r"test accuracy (\S+), loss (\S+),", capsys.readouterr().out).groups()
    expected = float(row["test_accuracy"]), float(row["test_loss"])
    # another CPU rounds otherwise
    assert tuple(map(float, printed)) == pytest.approx(expected, abs=3e-4)
    assert (
        f"seed 0 ({float(row['test_accuracy']):.2%})".replace("%", " %")
        in (ROOT / "README.md").read_text()
    )
