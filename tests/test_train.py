import inspect
import random
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import results
import torch
from conftest import ROOT, write_data
from sklearn.metrics import accuracy_score
from torch import nn

import dataset
import train
from common.console import command
from common.files import UserError
from model import SHIPPED_CHECKPOINT, load_checkpoint
from training import processes, report, runs
from training.settings import flag

# ---- The loss ----


def log_softmax(rows):
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def test_the_loss_of_smoothed_labels_and_teachers():
    settings = SimpleNamespace(precision="float32", label_smoothing=0.4)
    settings.teacher_weight, settings.temperature = 0.25, 4.0
    rows = np.random.default_rng(0).normal(size=(4, 3, 10)) * 2  # four models, three images
    target = 0.6 * np.eye(10)[[4, 0, 9]] + 0.4 / 10
    entropy = -(target * log_softmax(rows[0])).sum(axis=1).mean()
    p = np.exp([log_softmax(each / 4) for each in rows[1:]]).mean(axis=0)
    divergence = (p * (np.log(p) - log_softmax(rows[0] / 4))).sum(axis=1).mean()
    answers = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    model, *teachers = (lambda x, logits=logits: 1 * logits for logits in answers)
    x, labels = torch.zeros(3, 1, 28, 28), torch.tensor([4, 0, 9])
    for some, expected in (([], entropy), (teachers, 0.75 * entropy + 0.25 * 16 * divergence)):
        loss, logits = train.training_loss(model, some, x, labels, settings)
        assert torch.equal(logits, answers[0])
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert answers.grad[0].any() and not answers.grad[1:].any()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_computes_in_the_precision_asked_for(precision):
    x, dtype = torch.linspace(-1, 2, 784).view(1, 1, 28, 28), getattr(torch, precision)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    expected = x.flatten(1).to(dtype) @ model[1].weight.detach().to(dtype).T
    settings = SimpleNamespace(precision=precision, label_smoothing=0.0)
    loss, logits = train.training_loss(model, [], x, torch.tensor([3]), settings)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits.detach(), expected.float(), rtol=1e-5, atol=1e-5)


def test_predict_answers_in_evaluation_mode_and_leaves_the_mode(small_model, test_split):
    expected = small_model(dataset.normalize(test_split[0][:107]))
    small_model.train()
    logits = train.predict(small_model, test_split[0][:107])
    assert small_model.training and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


# ---- The loop ----


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


def numbers_of(images):
    """The number of each image, by its normalised bytes."""
    return {image.tobytes(): i for i, image in enumerate(dataset.normalize(images).numpy())}


def seen_in(calls):
    """The bytes of the images that each call of `training_loss` got, in order."""
    return [[image.tobytes() for image in arguments["x"].numpy()] for arguments, _ in calls]


PLAIN = dict(flip=False, shift=0, erase=0.0)  # no augmentation


def test_an_epoch_has_each_image_once_in_an_order_of_its_own(run_config, watch):
    config = run_config(**PLAIN, train_size=200, batch_size=50)
    calls = watch(train, "training_loss")
    train.train(config)
    images, labels, val_images, _ = splits_of(config)
    number = numbers_of(torch.cat([images, val_images]))
    order = [number[image] for batch in seen_in(calls) for image in batch]
    targets = torch.cat([arguments["targets"] for arguments, _ in calls])
    assert max(order) < 400 and torch.equal(targets, labels[order])  # no validation image
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    assert len(set(first)) == len(first) == 200
    assert set(first) == set(second) and first != second


def test_later_epochs_leave_out_a_part_of_the_easy_images(run_config, watch):
    calls = watch(train, "training_loss")
    config = run_config(**PLAIN, skip_easy=0.5, epochs=3)
    best = train.train(config)
    images, labels = splits_of(config)[:2]
    number = numbers_of(images)
    order = [number[image] for batch in seen_in(calls) for image in batch]
    # Of 160 images 96 are easy, and half of these are left out.
    first, second, third = order[:160], order[160:272], order[272:]
    assert [len(set(seen)) for seen in (first, second, third)] == [160, 112, 112]
    logits = torch.cat([result[1].detach() for _, result in calls]).double().numpy()
    values = -log_softmax(logits)[np.arange(len(order)), labels[order]]
    for seen, later in ((order[:160], second), (order[:272], third)):
        losses = dict(zip(seen, values, strict=False))  # an image's latest
        assert set(sorted(losses, key=losses.get)[96:]) <= set(later) < set(first)
    assert set(third) != set(second)
    history = load_checkpoint(best)[1]["history"]
    assert [row["images"] for row in history] == [160, 112, 112]


# Epochs of 10, 7 and 7 steps: 0.4 of the first one's, or at most a quarter of all.
@pytest.mark.parametrize("epochs, steps", [(0.4, 4), (1.0, 6)])
def test_the_learning_rate_warms_up(run_config, watch, epochs, steps):
    calls = watch(train, "take_step")
    train.train(run_config(lr=0.5, warmup_epochs=epochs, skip_easy=0.5, epochs=3))
    rates = [arguments["lr"] for arguments, _ in calls]
    first_rates = [0.5 * step / steps for step in range(1, steps + 1)] + [0.5]
    assert rates[: steps + 1] == pytest.approx(first_rates)
    # The averages of the first steps are short: step t keeps (1 + t) / (10 + t).
    decays = [(1 + t) / (10 + t) for t in range(len(calls))]
    assert [arguments["decay"] for arguments, _ in calls] == pytest.approx(decays)
    assert {arguments["grad_clip"] for arguments, _ in calls} == {1.0}


def test_each_batch_is_augmented_anew(run_config, watch):
    calls = watch(dataset, "augment")
    train.train(run_config(erase=0.75))
    assert len({result.numpy().tobytes() for _, result in calls}) == len(calls) == 20


def test_nothing_is_drawn_twice_from_the_same_numbers(run_config, watch):
    calls = watch(train, "seed_for")
    train.train(run_config(alternate_flip=True))
    drawn = {tuple(arguments.values()): result for arguments, result in calls}
    # weights and flips once, batches and layers in each of two epochs
    assert len(drawn) == len({*drawn.values()}) == 6


def test_alternate_flip_shows_each_image_both_ways(run_config, watch):
    calls = watch(train, "training_loss")
    options = PLAIN | dict(flip=True, alternate_flip=True, train_size=0, batch_size=50)
    train.train(run_config(**options))
    images = dataset.normalize(splits_of(run_config())[0]).numpy()
    plain = {image.tobytes() for image in images}
    mirrored = {image[:, :, ::-1].tobytes() for image in images}
    seen = [image for batch in seen_in(calls) for image in batch]
    assert len(seen) == len(set(seen)) == 800 and set(seen) == plain | mirrored
    calls.clear()
    train.train(run_config(**options | dict(flip=False)))
    assert {image for batch in seen_in(calls) for image in batch} == plain


def test_a_whitened_first_layer_is_not_trained(run_config, watch):
    calls = watch(train, "whiten_first_layer")
    best = train.train(run_config(whiten=True, train_size=0))
    assert torch.equal(calls[0][0]["x"], dataset.normalize(splits_of(run_config())[0]))
    conv, norm = load_checkpoint(best)[0].stem.first[0]
    assert torch.equal(conv.weight[::2], -conv.weight[1::2])
    assert norm.weight.tolist() == [1.0] * 4 and norm.bias.tolist() == [0.0] * 4
    assert norm.running_mean.abs().min() > 0  # its statistics follow the images


def test_the_history_has_cross_entropy_and_accuracy_of_the_unmixed_labels(
    run_config, watch, teacher
):
    calls = watch(train, "training_loss")
    options = dict(teacher=(str(teacher),), label_smoothing=0.3, epochs=1, alternate_flip=True)
    train.train(run_config(**options))
    first_labels = torch.cat([arguments["targets"] for arguments, _ in calls])
    calls.clear()
    config = run_config(**options, cutmix=1.0)  # the images come in the same order
    model, checkpoint = load_checkpoint(train.train(config))
    assert not any(arguments["teachers"][0].training for arguments, _ in calls)
    targets = torch.cat([arguments["targets"] for arguments, _ in calls])
    assert 0.4 < targets.gather(1, first_labels[:, None]).mean() < 0.65
    *_, val_images, val_labels = splits_of(config)
    logits = torch.cat([result[1] for _, result in calls])
    answers = dict(train=(logits, first_labels), val=(train.predict(model, val_images), val_labels))
    (row,) = checkpoint["history"]
    for split, (logits, labels) in answers.items():
        losses = -log_softmax(logits.detach().double().numpy())
        expected = losses[np.arange(len(labels)), labels.numpy()].mean()
        assert row[f"{split}_loss"] == pytest.approx(expected, rel=1e-4)
        assert row[f"{split}_accuracy"] == accuracy_score(labels, logits.argmax(dim=1))


def test_model_and_teachers_are_compiled_if_that_is_asked_for(
    run_config, watch, monkeypatch, teacher
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, losses = watch(torch, "compile"), watch(train, "training_loss")
    train.train(run_config(teacher=(str(teacher),), epochs=1, train_size=32, compile=True))
    assert [arguments["dynamic"] for arguments, _ in compiled] == [False, False]
    used = [losses[0][0]["model"], *losses[0][0]["teachers"]]
    assert used == [network for _, network in compiled]


# ---- Seeds ----


def test_another_seed_has_another_split_and_another_start(run_config):
    first, second = (train.start_run(run_config(seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.train_index, second.train_index)
    assert not torch.equal(first.val_index, second.val_index)
    assert not torch.equal(first.model.head.weight, second.model.head.weight)


def test_randomness_follows_from_seed_epoch_and_process(run_config, monkeypatch):
    training_loss, drawn = train.training_loss, []

    def drawing(model, teachers, x, *others):
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random(), x.sum().item()))
        return training_loss(model, teachers, x, *others)

    monkeypatch.setattr(train, "training_loss", drawing)
    for seed, rank in ((0, 0), (0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        train.train(run_config(seed=seed, train_size=16))  # a step an epoch
    once, again, other_seed, other_process = (drawn[i : i + 2] for i in range(0, 8, 2))
    assert once == again
    for source in range(3):
        assert len({row[source] for row in (*once, *other_seed, *other_process)}) == 6
    # All augment the same whole batch.
    assert [row[3] for row in once] == [row[3] for row in other_process]


# ---- Teachers ----


def test_a_teacher_that_saw_validation_images_is_refused(run_config, tmp_path, teacher):
    everything = dict(epochs=1, val_size=0, output_dir=str(tmp_path / "all"))
    saw_all = train.train(run_config(**everything))
    for path, changes in ((teacher, dict(seed=1)), (teacher, dict(val_size=150)), (saw_all, {})):
        with pytest.raises(UserError, match="trained on images to validate on"):
            train.start_run(run_config(teacher=(str(path),), **changes))
    for path, changes in ((teacher, {}), (saw_all, dict(val_size=0))):
        train.start_run(run_config(teacher=(str(path),), **changes))
    with pytest.raises(UserError, match="lies where this run saves: give another --output-dir"):
        train.start_run(run_config(teacher=(str(teacher),), output_dir=str(teacher.parent)))


def test_a_default_teacher_needs_no_parentheses():
    (path,) = runs.paths_of_teachers(SimpleNamespace(teacher="a.pt"))
    assert str(path) == "a.pt"


def test_the_record_learns_from_the_teacher_of_the_other_recipe(run_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = dict(epochs=1, val_size=0)
    record = run_config(**small, recipe="record", output_dir="checkpoints")
    command = "first run .* --recipe teacher --output-dir checkpoints/teacher"
    with pytest.raises(UserError, match=command):
        train.train(record)
    train.train(run_config(**small, recipe="teacher", output_dir="checkpoints/teacher"))
    trained = load_checkpoint(train.train(record))[1]
    assert trained["train_config"]["teacher"] == ("checkpoints/teacher/best.pt",)


# ---- The command line ----


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(val_size=9), "--val-size 9: give 0, or 10 to 490"),
        (dict(train_size=400), "--train-size 400: give 0, or 10 to 390"),
        (dict(batch_size=161), "--batch-size 161: give at most 160"),
        (dict(batch_size=161, epochs=1, skip_easy=1.0), "--batch-size 161: give at most 160"),
        (dict(batch_size=65, skip_easy=1.0), "at most 64, which are left when easy"),
        (dict(teacher=("nothing.pt",)), "cannot read nothing.pt"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run_config, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        train.train(run_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_test_file_that_is_missing_is_found_before_the_training(run_config, tmp_path):
    images, labels = torch.ones(400, 1, 28, 28).byte(), torch.arange(400) % 2
    write_data(tmp_path, "train", images, labels)
    (tmp_path / "classes.txt").write_text("even\nodd")
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is missing"):
        train.train(run_config(data_dir=str(tmp_path)))


def test_a_new_field_of_the_model_without_a_setting_is_named(run_config):
    config = run_config()
    del config.mlp_ratio
    with pytest.raises(UserError, match="ModelConfig has mlp_ratio: give it a row in SETTINGS"):
        train.make_model(config)


def test_a_weight_that_an_edited_optimizer_leaves_out_is_named(run_config, monkeypatch):
    monkeypatch.setattr(train, "make_optimizers", lambda *_: [])
    with pytest.raises(UserError, match="gives pos_embed to 0 optimizers"):
        train.train(run_config())


def test_every_setting_is_a_flag_that_help_explains(main, capsys):
    assert main("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, _, meaning) in train.SETTINGS.items():
        assert flag(name) in text and meaning in text
    assert " --lr float peak learning rate (default: 0.008)" in text
    assert f"--recipe {'|'.join(train.RECIPES)} " in text
    assert f"{command('train.py')} --recipe fast" in text


def test_an_evaluation_writes_two_pictures_and_nothing_else(main, flags, teacher, capsys, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "a model.pt").write_bytes(teacher.read_bytes())
    evaluation = ["--evaluate", here / "a model.pt", *flags[-2:], "--threads", 1]
    assert main(*evaluation) == 0
    names = {path.name for path in here.iterdir()}
    assert names == {"a model.pt", "a model_curves.png", "a model_confusion_matrix.png"}
    assert (here / "a model.pt").read_bytes() == teacher.read_bytes()
    images, labels = dataset.load(flags[-1], train=False)
    predictions = train.predict(load_checkpoint(teacher)[0], images).argmax(dim=1)
    out = capsys.readouterr().out
    assert f"test accuracy {accuracy_score(labels, predictions):.4f}, loss " in out
    assert report.class_report(labels, predictions, dataset.CLASS_NAMES) in out
    made = here / "a model_curves.png"
    made.unlink()
    made.mkdir()  # as in a folder that is read-only
    assert main(*evaluation) == 0
    assert "note: no pictures: cannot write" in capsys.readouterr().out


def test_an_evaluation_refuses_flags_that_it_does_not_use(main):
    said = main("--evaluate", "a.pt", "--resume", "--lr", 0.1, "--threads", 1)
    assert "does not use --lr, --resume: leave it out" in said


def test_paths_may_begin_with_the_home_folder(main, flags, small_data, teacher, tmp_path):
    (tmp_path / "x").symlink_to(small_data)
    own = [*flags[:-2], "--data-dir=~/x", "--epochs", 1]
    assert main(*own, "--output-dir", "~/other", "--teacher", "~/teacher/best.pt") == 0
    assert main("--evaluate=~/other/best.pt", "--data-dir", "~/x", "--threads", 1) == 0


def test_a_run_outlives_its_output(main, flags, monkeypatch, capsys, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(*flags, "--epochs", 1) == 0
    assert (tmp_path / "checkpoints" / "best_curves.png").exists()
    assert "some of the output could not be written" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_checkpoint_is_as_accurate_as_stated(main, data_dir, tmp_path, capsys):
    shutil.copy(SHIPPED_CHECKPOINT, tmp_path / "model.pt")
    assert main("--evaluate", "model.pt", "--data-dir", data_dir, "--threads", 1) == 0
    rows = results.read(ROOT / "benchmarks" / "seeds.csv")
    (row,) = (row for row in rows if "record" in row["command"] and row["seed"] == "0")
    printed = re.search(r"test accuracy (\S+), loss (\S+),", capsys.readouterr().out).groups()
    expected = float(row["test_accuracy"]), float(row["test_loss"])
    # another CPU rounds otherwise
    assert tuple(map(float, printed)) == pytest.approx(expected, abs=3e-4)
    assert f"seed 0 ({100 * expected[0]:.2f} %)" in (ROOT / "README.md").read_text()
