import csv
import inspect
import random
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import accuracy_score
from torch import nn

import dataset
import train
from common.console import command
from common.files import UserError
from model import SHIPPED_CHECKPOINT, load_checkpoint
from training import processes, report, runs
from training.settings import choose_settings, flag

# ---- The loss ----


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


@pytest.mark.parametrize(
    "smoothing, count, weight, temperature", [(0.4, 0, 0.9, 2.0), (0.4, 3, 0.25, 4.0)]
)
def test_the_loss_of_smoothed_labels_and_teachers(smoothing, count, weight, temperature):
    settings = SimpleNamespace(precision="float32", label_smoothing=smoothing)
    settings.teacher_weight, settings.temperature = weight, temperature
    loss, logits = train.training_loss(MODEL, TEACHERS[:count], X, LABELS, settings)
    assert torch.equal(logits, MODEL.logits)
    target = (1 - smoothing) * np.eye(10)[LABELS.numpy()] + smoothing / 10
    expected = -(target * log_softmax(ROWS[0])).sum(axis=1).mean()
    if count:
        softened = [np.exp(log_softmax(rows / temperature)) for rows in ROWS[1 : 1 + count]]
        p, log_q = np.mean(softened, axis=0), log_softmax(ROWS[0] / temperature)
        divergence = (p * (np.log(p) - log_q)).sum(axis=1).mean()
        expected = (1 - weight) * expected + weight * temperature**2 * divergence
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(teacher.logits.grad is None for teacher in TEACHERS)


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
    expected = small_model(dataset.normalize(test_split[0][:7]))
    small_model.train()
    logits = train.predict(small_model, test_split[0][:7], batch_size=3)
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
    expected = (labels.bincount() / 2).tolist()
    assert labels[first].bincount().tolist() == pytest.approx(expected, abs=1)


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
    losses = {}
    for start, seen, later in ((0, first, second), (160, second, third)):
        rows = log_softmax(logits[start : start + len(seen)])
        losses |= dict(zip(seen, -rows[np.arange(len(seen)), labels[seen]], strict=True))
        assert set(sorted(losses, key=losses.get)[96:]) <= set(later) < set(first)
    assert set(third) != set(second)
    history = load_checkpoint(best)[1]["history"]
    assert [row["images"] for row in history] == [160, 112, 112]


@pytest.mark.parametrize(
    "changes, first_rates",
    [
        (dict(warmup_epochs=1.0), [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]),  # 20 steps: a quarter at most
        # 10, 4 and 4 steps: epochs of the first one's length
        (dict(warmup_epochs=0.4, skip_easy=1.0, epochs=3), [0.125, 0.25, 0.375, 0.5, 0.5]),
    ],
)
def test_the_learning_rate_warms_up(run_config, watch, changes, first_rates):
    calls = watch(train, "take_step")
    train.train(run_config(lr=0.5, **changes))
    rates = [arguments["lr"] for arguments, _ in calls]
    assert rates[: len(first_rates)] == pytest.approx(first_rates)
    # The averages of the first steps are short: step t keeps (1 + t) / (10 + t).
    decays = [(1 + t) / (10 + t) for t in range(len(calls))]
    assert [arguments["decay"] for arguments, _ in calls] == pytest.approx(decays)
    assert {arguments["grad_clip"] for arguments, _ in calls} == {1.0}


def test_images_are_augmented_as_the_settings_say(run_config, watch):
    calls = watch(dataset, "augment")
    asked = dict(flip=False, shift=3, erase=0.75, erase_area=0.5, rotate=20.0, noise=0.2)
    asked |= dict(stretch=1.5)
    train.train(run_config(**asked))
    assert len(calls) == 20 and all(arguments | asked == arguments for arguments, _ in calls)
    assert len({result.numpy().tobytes() for _, result in calls}) == 20


def test_nothing_is_drawn_twice_from_the_same_numbers(run_config, watch):
    calls = watch(train, "seed_for")
    train.train(run_config(alternate_flip=True))
    drawn = {tuple(arguments.values())[1:]: result for arguments, result in calls}
    assert sorted(drawn, key=str) == [
        ("batches", 0), ("batches", 1), ("flips",), ("layers", 0, 0), ("layers", 1, 0), ("weights",)
    ]  # fmt: skip
    assert len({*drawn.values(), train.seed_for(1, "weights")}) == 7


def test_alternate_flip_shows_each_image_both_ways(run_config, watch):
    calls = watch(train, "training_loss")
    options = PLAIN | dict(flip=True, alternate_flip=True, train_size=0, batch_size=50)
    train.train(run_config(**options))
    images = dataset.normalize(splits_of(run_config())[0]).numpy()
    plain = {image.tobytes() for image in images}
    mirrored = {image[:, :, ::-1].tobytes() for image in images}
    seen = [image for batch in seen_in(calls) for image in batch]
    assert len(seen) == len(set(seen)) == 800 and set(seen) == plain | mirrored
    assert 150 < sum(image in mirrored for image in seen[:400]) < 250
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


def test_with_cutmix_accuracy_is_that_of_the_first_labels(run_config, watch):
    calls = watch(train, "training_loss")
    train.train(run_config(epochs=1))
    labels = torch.cat([arguments["targets"] for arguments, _ in calls])
    calls.clear()
    best = train.train(run_config(epochs=1, cutmix=1.0))  # the images come in the same order
    targets = torch.cat([arguments["targets"] for arguments, _ in calls])
    assert 0.4 < targets.gather(1, labels[:, None]).mean() < 0.65
    logits = torch.cat([result[1] for _, result in calls])
    (row,) = load_checkpoint(best)[1]["history"]
    right = (logits.argmax(dim=1) == labels).double().mean().item()
    assert row["train_accuracy"] == pytest.approx(right)


def test_losses_of_the_history_are_plain_cross_entropy(run_config, watch, teacher):
    calls = watch(train, "training_loss")
    config = run_config(teacher=(str(teacher),), label_smoothing=0.3, epochs=1)
    model, checkpoint = load_checkpoint(train.train(config))
    assert not any(arguments["teachers"][0].training for arguments, _ in calls)
    *_, val_images, val_labels = splits_of(config)
    logits = torch.cat([result[1] for _, result in calls])
    targets = torch.cat([arguments["targets"] for arguments, _ in calls])
    answers = dict(train=(logits, targets), val=(train.predict(model, val_images), val_labels))
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_the_replayed_steps_are_the_steps(run_config, tmp_path):
    options = dict(device="cuda", cutmix=0.5, rotate=15.0, noise=0.1, lr=1e-3, whiten=True)
    losses = []
    for is_replayed in (True, False):
        best = train.train(run_config(**options, cuda_graph=is_replayed))
        losses.append([row["train_loss"] for row in load_checkpoint(best)[1]["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- Seeds ----


def test_another_seed_has_another_split_and_another_start(run_config, watch):
    parts, models = watch(train, "load_data"), watch(train, "make_optimizers")
    for seed in (0, 1):
        train.start_run(run_config(seed=seed))
    first, second = (set(result[2].tolist()) for _, result in parts)
    assert len(first & second) < 100  # of 160
    assert not torch.equal(models[0][0]["model"].head.weight, models[1][0]["model"].head.weight)


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
    # all augment the same whole batch
    assert [row[3] for row in once] == [row[3] for row in other_process]


# ---- Teachers ----


@pytest.fixture
def teacher(run_config, tmp_path):
    """The checkpoint of a run of one epoch."""
    return train.train(run_config(epochs=1, output_dir=str(tmp_path / "teacher")))


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
    record = vars(run_config(**small, output_dir="checkpoints")) | dict(recipe="record")
    del record["teacher"]
    record = choose_settings(train.SETTINGS, train.RECIPES, record)
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
        (dict(teacher=("nothing.pt",)), "cannot read nothing.pt"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run_config, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        train.train(run_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_test_file_that_is_missing_is_found_before_the_training(
    run_config, small_data, monkeypatch, tmp_path
):
    for path in small_data.glob("train-*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        train.train(run_config(data_dir=str(tmp_path)))


def test_a_new_field_of_the_model_without_a_setting_is_named(run_config):
    config = run_config()
    del config.mlp_ratio
    with pytest.raises(UserError, match="ModelConfig has mlp_ratio: give it a row in SETTINGS"):
        train.make_model(config)


def test_a_weight_that_an_edited_optimizer_leaves_out_is_named(run_config, monkeypatch):
    def edited(model, *_):
        return [torch.optim.SGD(model.head.parameters(), lr=0.0)]

    monkeypatch.setattr(train, "make_optimizers", edited)
    with pytest.raises(UserError, match="pos_embed"):
        train.train(run_config())


def test_every_setting_is_a_flag_that_help_explains(main, capsys):
    assert main("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, _, meaning) in train.SETTINGS.items():
        assert flag(name) in text and meaning in text
    assert " --lr float peak learning rate (default: 0.008)" in text
    assert f"--recipe {'|'.join(train.RECIPES)} " in text
    assert f"{command('train.py')} --recipe fast" in text
    for name, title in train.GROUPS.items():
        assert f" {title}: {flag(name)}" in text


def test_an_evaluation_writes_two_pictures_and_nothing_else(main, flags, teacher, capsys, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "a model.pt").write_bytes(teacher.read_bytes())
    (here / "best_curves.png").write_text("another model's")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    evaluation = ["--evaluate", here / "a model.pt", *flags[-2:], "--threads", 1]
    assert main(*evaluation) == 0
    made = {path.name for path in here.iterdir()} - before.keys()
    assert made == {"a model_curves.png", "a model_confusion_matrix.png"}
    assert {name: (here / name).read_bytes() for name in before} == before
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


def test_paths_may_begin_with_the_home_folder(main, flags, small_data, teacher, monkeypatch):
    monkeypatch.setenv("HOME", str(teacher.parents[1]))
    (teacher.parents[1] / "x").symlink_to(small_data)
    own = [*flags[:-2], "--data-dir=~/x", "--epochs", 1]
    assert main(*own, "--output-dir", "~/other", "--teacher", "~/teacher/best.pt") == 0
    assert main("--resume", "--output-dir=~/other") == 0
    assert main("--evaluate=~/other/best.pt", "--data-dir", "~/x", "--threads", 1) == 0


def test_a_run_outlives_its_output(main, flags, monkeypatch, capsys, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(*flags) == 0
    assert len(load_checkpoint(tmp_path / "checkpoints" / "last.pt")[1]["history"]) == 2
    assert "some of the output could not be written" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_checkpoint_is_as_accurate_as_stated(main, data_dir, tmp_path, capsys):
    shutil.copy(SHIPPED_CHECKPOINT, tmp_path / "model.pt")
    assert main("--evaluate", "model.pt", "--data-dir", data_dir, "--threads", 1) == 0
    with open(ROOT / "benchmarks" / "seeds.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "record" in row["command"]]
    (row,) = (row for row in rows if row["seed"] == "0")
    printed = re.search(r"test accuracy (\S+), loss (\S+),", capsys.readouterr().out).groups()
    expected = float(row["test_accuracy"]), float(row["test_loss"])
    # another CPU rounds otherwise
    assert tuple(map(float, printed)) == pytest.approx(expected, abs=3e-4)
    assert f"seed 0 ({100 * expected[0]:.2f} %)" in (ROOT / "README.md").read_text()
