"""Other data than Fashion-MNIST: idx files with a list of classes, folders of pictures."""

import gzip
import re
import struct
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, flags_of, write_data
from PIL import Image
from torch.nn.functional import cross_entropy

import dataset
import train
from common.files import UserError
from model import SHIPPED_CHECKPOINT, load_checkpoint

FILES = tuple(dataset.FILES)
IMAGES = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
IMAGES[3], IMAGES[0, 0, 0, 5] = 255, 7
LABELS = torch.tensor([2, 0, 1, 2])
PICTURES = {"wide & $x": (3, 1), "tall": (1, 3), "disc": (1, 1)}  # weights of height and width
RESULT = r"test accuracy (\S+), loss (\S+), .* 19 images"


@pytest.fixture
def own(tmp_path):
    """Four training and two test images of three classes, some of the files compressed."""
    folder = tmp_path / "own"
    write_data(folder, "train", IMAGES, LABELS)
    write_data(folder, "t10k", IMAGES[2:], LABELS[2:])
    for name in FILES[1:3]:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    (folder / "classes.txt").write_bytes("\ufeffzero/0\r\n eins \r\n二 $x\r\n\r\n".encode())
    return folder


def test_a_list_of_classes_makes_files_another_data_set(own):
    for is_train, some in ((True, slice(4)), (False, slice(2, 4))):
        images, labels = dataset.load(own, is_train)
        assert images.dtype == torch.uint8 and torch.equal(images, IMAGES[some])
        assert labels.dtype == torch.int64 and torch.equal(labels, LABELS[some])
    # A quarter of the 3,136 pixels is white: the deviation is the root of 3 / 16 * 3136 / 3135.
    names, mean, std = dataset.describe(own, IMAGES)
    assert names == dataset.class_names(own) == ("zero/0", "eins", "二 $x")
    assert (mean, std) == (0.25, 0.4331)
    (own / "classes.txt").unlink()
    advice = f"move it away, or write its classes to {own / 'classes.txt'}"
    with pytest.raises(UserError, match=advice):
        dataset.load(own, train=True)


def header(ndim, *shape):
    return struct.pack(f">{1 + ndim}I", 0x800 + ndim, *shape)


ANEW = "is missing, damaged or not of 28x28 pixels"
FAULTS = [
    (0, header(3, 4, 28, 28) + bytes(4 * 784 - 1), ANEW),
    (0, header(3, 0, 28, 28), ANEW),
    (0, struct.pack(">4I", 0xD03, 4, 28, 28) + bytes(4 * 784), ANEW),
    (0, header(3, 4, 14, 56) + bytes(4 * 784), ANEW),
    (0, b"", ANEW),
    (1, header(1, 3) + bytes(3), "3 labels up to 0 do not fit 4 images"),
    (1, header(1, 4) + bytes([0, 1, 2, 3]), "4 labels up to 3 do not fit 4 images, 3 classes"),
]


@pytest.mark.parametrize("number, content, words", FAULTS)
def test_a_file_that_is_not_what_its_header_says_is_named(own, number, content, words):
    (own / f"{FILES[number]}.gz").unlink(missing_ok=True)
    (own / FILES[number]).write_bytes(content)
    with pytest.raises(UserError, match=words) as stop:
        dataset.load(own, train=True)
    assert str(own / FILES[number]) in str(stop.value)


@pytest.mark.parametrize("lines", ["one", "", "a\n\nb", "a\nb\na"])
def test_a_list_that_is_none_is_named(own, lines):
    (own / "classes.txt").write_text(lines)
    with pytest.raises(UserError, match=r"classes\.txt has to name two classes"):
        dataset.class_names(own)


# ---- Pictures ----


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def read_name(path):
    """Stands in for reading: the image is full of the number in the file's name."""
    if "bad" in path.name:
        return None
    return np.full((28, 28), int(path.stem), np.uint8)


def load_both(folder):
    """The numbers of the pictures of each class, (train, test)."""
    splits = [dataset.load(folder, is_train, read_name) for is_train in (True, False)]
    return [[set(x[y == k, 0, 5, 5].tolist()) for k in range(2)] for x, y in splits]


def test_a_fifth_of_each_class_is_for_the_test(tmp_path):
    touch(tmp_path / "b", *(f"{i}.png" for i in range(100, 148)))
    touch(tmp_path / "a", *(f"{i}.JPG" for i in range(20)), ".1.jpg", "notes.txt", "bad.jpg")
    touch(tmp_path / ".hidden", "1.png")
    assert dataset.class_names(tmp_path) == ("a", "b")
    train_sets, test_sets = load_both(tmp_path)
    for k, numbers in enumerate((range(20), range(100, 148))):
        assert not train_sets[k] & test_sets[k] and train_sets[k] | test_sets[k] == set(numbers)
    assert len(test_sets[0]) in (4, 5) and len(test_sets[1]) == 10  # of 21 and of 48
    labels = dataset.load(tmp_path, True, read_name)[1]
    assert (labels.diff() != 0).sum() > 10  # classes are mixed
    # Pictures that are added leave the others where they are, nearly all.
    touch(tmp_path / "b", *(f"{i}.png" for i in range(148, 200)))
    now_train, now_test = load_both(tmp_path)
    assert len(now_test[1] & train_sets[1]) + len(now_train[1] & test_sets[1]) <= 3


def test_folders_that_are_no_classes_of_pictures(tmp_path):
    touch(tmp_path / "a", "1.png", "2.png")
    with pytest.raises(UserError, match="two classes or more"):
        dataset.class_names(tmp_path)
    touch(tmp_path / "b", "2.txt", "bad.png", "bad2.png")
    with pytest.raises(UserError, match=f"{tmp_path} has a class of too few pictures"):
        dataset.load(tmp_path, True, read_name)
    touch(tmp_path, FILES[0])
    assert dataset.class_names(tmp_path) == dataset.CLASS_NAMES


@pytest.fixture
def pictures(tmp_path):
    """Thirty made-up pictures of ellipses of three kinds, on light grounds, and a broken one."""
    pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:70j, -1:1:70j]
    for name, weights in PICTURES.items():
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(30):
            size, dy, dx = random.uniform([0.4, -0.2, -0.2], [0.7, 0.2, 0.2])
            thing = np.hypot(weights[0] * (y - dy), weights[1] * (x - dx)) < size
            pixels = np.full((70, 70, 3), 235, np.uint8)
            pixels[thing] = random.integers(20, 120, 3)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    (tmp_path / "pictures/disc/broken.png").write_text("?")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_is_learnt_resumed_tested_and_explained(
    pictures, main, script, monkeypatch, capsys, tmp_path, small_data
):
    visulization = pytest.importorskip("Visulization", exc_type=SystemExit)
    monkeypatch.setattr(visulization, "set_threads", lambda: None)
    settings = SMALL_RUN | dict(train_size=0, val_size=0, epochs=6, batch_size=12, lr=0.02)
    settings |= dict(data_dir=str(pictures), quiet=False, cutmix=0.1)
    loss, darkest = train.training_loss, []

    def stop_later(model, teachers, x, *others):
        darkest.append(x.min().item())
        if len(darkest) == 20:
            raise KeyboardInterrupt
        return loss(model, teachers, x, *others)

    monkeypatch.setattr(train, "training_loss", stop_later)
    assert main(*flags_of(settings)) == 130
    broken = pictures / "disc/broken.png"
    assert f"left out: {broken} cannot be read" in capsys.readouterr().err
    assert main("--resume", "--data-dir", small_data) == (
        "train.py: error: the data has changed since the run began: put it back"
    )
    moved = (pictures / "disc/001.png").rename(pictures / "disc/moved.png")
    assert "the data has changed" in main("--resume")
    moved.rename(pictures / "disc/001.png")
    assert main("--resume") == 0
    out = capsys.readouterr().out
    accuracy, test_loss = map(float, re.search(RESULT, out).groups())
    assert accuracy > 0.9 and "wide & $x     " in out and "Trouser" not in out
    model, _ = load_checkpoint("checkpoints/best.pt")
    images = dataset.load(pictures, True, visulization.image_of)[0]
    assert model.data == dataset.describe(pictures, images) and len(images) == 71
    assert model.data.class_names == tuple(sorted(PICTURES))
    assert darkest == pytest.approx([-model.data.mean / model.data.std] * len(darkest))
    x, y = dataset.load(pictures, False, visulization.image_of)
    logits = model((x / 255 - model.data.mean) / model.data.std)
    assert test_loss == pytest.approx(cross_entropy(logits, y).item(), abs=1e-3)

    refusal = main("--evaluate", SHIPPED_CHECKPOINT, "--data-dir", pictures, "--threads", 1)
    assert f"{SHIPPED_CHECKPOINT} knows other classes than those of {pictures}: give" in refusal

    draw = partial(script, visulization, "--checkpoint", "checkpoints/best.pt")
    own = ["--data-dir", pictures]
    draw("--num-images", 1, "--html", *own)
    draw("--num-images", 1, *own)
    page = (tmp_path / "HeapImg/checkpoints_best/index.html").read_text()
    assert 'data-true="wide &amp; $x"' in page and "predicted wide &amp; $x" in page
    assert len([*tmp_path.glob("HeapImg/checkpoints_best/*_wide----x_as_*.png")]) == 1
    draw("--image", pictures / "tall/003.png", *own)
    assert "tall/003.png: tall " in capsys.readouterr().out
    assert "knows other classes than" in draw("--index", 0, "--data-dir", small_data)
    assert "'Shirt' is none of: disc, tall, wide & $x, or 0 to 2" in draw("--classes", "Shirt")


def test_a_class_is_found_by_its_name_before_its_number():
    visulization = pytest.importorskip("Visulization", exc_type=SystemExit)
    names = ("A", "a", "10", "0", "Bag")
    words = ("A", "a", "10", "0", "bag", "4")
    assert [visulization.class_index(word, names) for word in words] == [0, 1, 2, 3, 4, 4]


def test_a_teacher_of_other_data_is_refused(own, run_config):
    sizes = dict(val_size=0, train_size=0, batch_size=2)
    config = run_config(data_dir=str(own), teacher=(str(SHIPPED_CHECKPOINT),), **sizes)
    with pytest.raises(UserError, match=f"model.pt was trained on other data than {own}: "):
        train.start_run(config)
