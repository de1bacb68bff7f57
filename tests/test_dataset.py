import gzip
import math
import os
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from conftest import write_data
from sklearn.metrics import accuracy_score

import dataset
from common.files import UserError
from dataset import DataError

NAMES = tuple(dataset.FILES)
IMAGES, LABELS = (
    torch.arange(3 * 784).remainder(251).byte().view(3, 1, 28, 28),
    torch.tensor([7, 0, 9]),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A data set of three images each way; no source has it but what a test makes."""
    folder = tmp_path / "good"
    hashes = write_data(folder, "train", IMAGES, LABELS) | write_data(
        folder, "t10k", IMAGES.flip(0), LABELS.flip(0)
    )
    monkeypatch.setattr(dataset, "FILES", hashes)
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "no-such-folder")
    monkeypatch.setattr(dataset.FashionMNIST, "mirrors", [])
    monkeypatch.setenv("PATH", str(tmp_path / "no-such-folder"))
    return folder


def packed(folder, target):
    """The files of a folder, compressed into another one."""
    target.mkdir(parents=True)
    for name in NAMES:
        (target / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    return target


def assert_is_tiny(folder):
    for train, order in ((True, [0, 1, 2]), (False, [2, 1, 0])):
        images, labels = dataset.load(folder, train)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, IMAGES[order]) and torch.equal(labels, LABELS[order])


# ---- Getting the files ---------------------------------------------------------------------------


def test_the_splits_are_the_published_ones(data_dir, test_split):
    images, labels = dataset.load(data_dir, train=True)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [6000] * 10
    assert test_split[0].shape == (10_000, 1, 28, 28)
    assert test_split[1].bincount().tolist() == [1000] * 10
    assert [dataset.CLASS_NAMES[label] for label in test_split[1][:3]] == [
        "Ankle boot",
        "Pullover",
        "Trouser",
    ]
    pixels = images.double() / 255
    assert pixels.mean().item() == pytest.approx(dataset.MEAN, abs=5e-5)
    assert pixels.std().item() == pytest.approx(dataset.STD, abs=5e-5)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_files_are_read_where_they_lie_and_nothing_is_written(tiny, tmp_path, monkeypatch, place):
    def refuse(path):
        raise UserError("read-only")

    monkeypatch.setattr(dataset, "whole_file", refuse)
    folder = packed(tiny, tmp_path / "packed" / place)
    assert_is_tiny(tmp_path / "packed")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is_tiny("~/packed")
    (folder / f"{NAMES[0]}.gz").unlink()
    (folder / NAMES[0]).write_bytes((tiny / NAMES[0]).read_bytes())  # not compressed
    assert_is_tiny(tmp_path / "packed")
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", folder)  # the package, where it is installed
    assert_is_tiny(tmp_path / "empty")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [NAMES[0], *(f"{name}.gz" for name in NAMES[1:])]
    )
    assert not (tmp_path / "empty").exists()


DAMAGE = {
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "a web page": lambda content: b"<html>please log in</html>",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_another_source_used(tiny, capsys, name, damage):
    good = (tiny / name).read_bytes()
    (tiny / name).write_bytes(DAMAGE[damage](good))
    with pytest.raises(DataError, match=f"no good copy of {name} is in {tiny}") as error:
        dataset.load(tiny, train=name.startswith("train"))
    assert "\n" not in str(error.value)
    for way in (
        "none could be fetched",
        "'apt-get'",
        "the four .gz files of https://",
        "apt-get install",
    ):
        assert way in str(error.value)
    (tiny / f"{name}.gz").write_bytes(gzip.compress(good))  # as a person may put it there
    capsys.readouterr()
    assert_is_tiny(tiny)
    assert capsys.readouterr().err.splitlines() == [
        f"dataset: {tiny / name} is damaged: move it away"
    ]


@pytest.mark.parametrize(
    "cut", [lambda packed: packed[: len(packed) // 2], lambda packed: packed[:-9] + b"\0" * 9]
)
def test_a_damaged_archive_is_refused(tiny, tmp_path, capsys, cut):
    folder = packed(tiny, tmp_path / "packed")
    archive = folder / f"{NAMES[2]}.gz"
    archive.write_bytes(cut(archive.read_bytes()))
    with pytest.raises(DataError, match=f"no good copy of {NAMES[2]}"):
        dataset.load(folder, train=False)
    assert f"{archive} is damaged" in capsys.readouterr().err


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder as torchvision's mirrors; one at /bad/ sends another page."""
    servers = []

    def serve(folder, *starts):
        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                if not self.path.startswith("/bad/"):
                    return super().do_GET()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>please log in</html>")

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            dataset.FashionMNIST, "mirrors", [f"{address}{start}" for start in starts]
        )

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def apt(tiny, tmp_path, monkeypatch):
    """Stands in for apt on a machine whose own package lists are empty."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "not-installed")
    packed(tiny, tmp_path / "package" / dataset.DEBIAN_FOLDER.relative_to("/"))
    (commands / "apt-get").write_text(
        'case "$*" in *Dir::State*update) touch lists/updated;; '
        "*Dir::State*download*) test -e lists/updated && touch a.deb;; *) exit 100;; esac"
    )
    (commands / "dpkg-deb").write_text(f'cp -r "{tmp_path / "package"}/." "$3"')
    for command in commands.iterdir():
        command.write_text(f"#!/bin/sh\n{command.read_text()}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.defpath}")


def test_a_mirror_that_sends_something_else_is_passed_over(tiny, serve, apt, tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: pytest.fail("the second mirror was enough")
    )
    served = packed(tiny, tmp_path / "served")
    serve(served, "/bad/", "/")
    assert_is_tiny(tmp_path / "new" / "data")
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "new" / "data").iterdir()}
    assert fetched == {path.name: path.read_bytes() for path in served.iterdir()}


def test_a_truncated_archive_is_replaced(tiny, serve, apt, tmp_path, capsys):
    serve(served := packed(tiny, tmp_path / "served"), "/")
    assert_is_tiny(tmp_path / "data")
    archive = tmp_path / "data" / f"{NAMES[0]}.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    assert_is_tiny(tmp_path / "data")
    assert archive.read_bytes() == (served / archive.name).read_bytes()


def test_another_data_set_stops_and_is_left_as_it_is(tiny, serve, apt, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tiny)  # nor is an installed package taken
    serve(packed(tiny, tmp_path / "served"), "/")
    digits, letters = tmp_path / "digits", tmp_path / "letters"
    # the images are Fashion-MNIST's, the labels are not
    write_data(digits, "train", IMAGES, LABELS.flip(0))
    write_data(digits, "t10k", IMAGES, LABELS)
    packed(digits, letters)
    (letters / f"{NAMES[0]}.gz").write_bytes(gzip.compress(b"letters"))
    for folder in (digits, letters):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for is_train in (True, False):
            with pytest.raises(
                DataError, match=r"intact, but not of Fashion-MNIST .*; give another --data-dir"
            ) as error:
                dataset.load(folder, is_train)
        assert "t10k-images-idx3-ubyte" in str(error.value) and "(3x28x28 values)" in str(
            error.value
        )
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    good_labels = gzip.compress((tiny / NAMES[1]).read_bytes())
    (digits / f"{NAMES[1]}.gz").write_bytes(good_labels)
    dataset.load(digits, train=True)  # a good copy beside it


def test_a_file_that_was_unpacked_under_its_old_name_is_read(tiny, tmp_path):
    folder = packed(tiny, tmp_path / "packed")
    (folder / f"{NAMES[0]}.gz").write_bytes((tiny / NAMES[0]).read_bytes())
    (folder / f"{NAMES[3]}.gz").rename(folder / NAMES[3])  # and a compressed one without .gz
    assert_is_tiny(folder)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tiny, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dataset.Path, "read_bytes", refuse)
    with pytest.raises(
        DataError, match=rf"cannot read {tiny}/{NAMES[0]}: Permission denied; make it readable"
    ):
        dataset.load(tiny, train=True)
    assert capsys.readouterr().err == ""


def test_without_a_mirror_the_package_is_fetched_once_and_unpacked(
    tiny, serve, apt, tmp_path, capsys
):
    serve(tmp_path, "/bad/", "/missing/")
    dataset.load(tmp_path / "data", train=True)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        f"{name}.gz" for name in NAMES
    )
    capsys.readouterr()
    assert_is_tiny(tmp_path / "data")
    assert capsys.readouterr().err == ""


def test_a_package_with_other_content_is_refused(tiny, apt, tmp_path):
    archive = next((tmp_path / "package").rglob(f"{NAMES[0]}.gz"))
    archive.write_bytes(gzip.compress(b"another data set"))
    with pytest.raises(DataError, match="the download is not the published file"):
        dataset.load(tmp_path / "data", train=True)
    assert not (tmp_path / "data").exists()


def test_a_download_that_cannot_be_written_leaves_nothing_half_written(
    tiny, serve, tmp_path, monkeypatch
):
    def fail(handle):
        raise OSError(28, "No space left on device")

    serve(packed(tiny, tmp_path / "served"), "/")
    monkeypatch.setattr(dataset.os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        dataset.load(tmp_path / "data", train=True)
    assert not list((tmp_path / "data").iterdir())
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"cannot read .*a file/data/.*: Not a directory"):
        dataset.load(tmp_path / "a file" / "data", train=True)


# ---- The split and the scale ---------------------------------------------------------------------


def test_the_validation_split_is_stratified_and_disjoint():
    # 10 images of class 0 to 100 of class 9
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))
    train, val = dataset.split_indices(labels, 55, seed=0)
    assert labels[val].bincount().tolist() == list(range(1, 11))  # a tenth of each
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(550))
    assert torch.equal(train, train.sort().values) and torch.equal(val, val.sort().values)
    assert torch.equal(val, dataset.split_indices(labels, 55, seed=0)[1])
    assert not torch.equal(val, dataset.split_indices(labels, 55, seed=1)[1])
    everything, nothing = dataset.split_indices(labels, 0, seed=0)
    assert torch.equal(everything, torch.arange(550)) and nothing.tolist() == []


def test_the_split_of_the_shipped_checkpoint_stays_what_it_was(data_dir):
    # Another split would let its validation images into the training of those that learn from it.
    val = dataset.split_indices(dataset.load(data_dir, train=True)[1], 5000, seed=0)[1]
    assert (val[:5].tolist(), val.sum().item()) == ([1, 14, 16, 25, 30], 147_303_911)


def test_normalize_by_hand():
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([255, 51])
    x = dataset.normalize(images)
    expected = [(1 - 0.2860) / 0.3530, (0.2 - 0.2860) / 0.3530, -0.2860 / 0.3530]
    assert x.dtype == torch.float32 and x[0, 0, 0, :3].tolist() == pytest.approx(expected)
    assert images[0, 0, 0, 0] == 255  # left as it is


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 28, 28, dtype=torch.uint8)]
)
def test_normalize_refuses_what_the_model_would_misread(wrong):
    with pytest.raises(ValueError, match="expected uint8 images of shape"):
        dataset.normalize(wrong)


# ---- Augmentation --------------------------------------------------------------------------------


def augmented(images, **options):
    settings = dict(flip=False, shift=0, erase=0.0) | options
    return dataset.augment(images, torch.Generator().manual_seed(7), **settings)


def test_the_channels_of_a_colour_image_move_together(test_split):
    gray = test_split[0][:50]
    colored = torch.cat([gray, gray // 2, 255 - gray], dim=1)
    moved, alone = (augmented(images, flip=True, shift=3) for images in (colored, gray))
    assert moved.shape == (50, 3, 28, 28)
    assert torch.equal(moved[:, :1], alone) and torch.equal(moved[:, 1:2], alone // 2)
    # uncovered pixels are black
    assert torch.equal(moved[:, 2, 3:-3, 3:-3], 255 - alone[:, 0, 3:-3, 3:-3])


def test_without_augmentation_images_stay_as_they_are(test_split):
    assert torch.equal(augmented(test_split[0][:5]), test_split[0][:5])


def test_flip_mirrors_half_of_the_images_left_to_right(test_split):
    images = test_split[0][:1000]
    flipped = augmented(images, flip=True)
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert 450 < mirrored.sum() < 550


def test_alternate_flip_shows_every_image_both_ways_in_two_epochs(test_split):
    images, epochs = test_split[0][:1000], []
    for epoch in range(4):
        flipped = dataset.alternate_flip(images, torch.Generator().manual_seed(7), epoch)
        same = (flipped == images).flatten(1).all(dim=1)
        mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
        assert torch.equal(same, ~mirrored)
        epochs.append(mirrored)
    assert 450 < epochs[0].sum() < 550
    assert torch.equal(epochs[1], ~epochs[0]) and torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])


def test_an_order_has_all_hard_images_and_some_easy_ones():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    losses[-400:] += 1  # the hardest two fifths
    orders = [
        dataset.epoch_order(losses, torch.Generator().manual_seed(seed), skipped=500)
        for seed in range(100)
    ]
    assert all(len(order) == len(set(order.tolist())) == 500 for order in orders)
    assert all(set(range(600, 1000)) < set(order.tolist()) for order in orders)
    times = torch.cat(orders).bincount(minlength=1000)[:600]
    # by chance one of six easy images, which is 17 of 100 times
    assert 0 < times.min() and times.max() < 40
    hard = (torch.stack(orders) >= 600).float()
    for part in hard.split(100, dim=1):  # as many of them in every part of the epoch
        assert part.mean().item() == pytest.approx(0.8, abs=0.02)
    whole = dataset.epoch_order(losses, torch.Generator().manual_seed(0), skipped=0)
    assert torch.equal(whole, torch.randperm(1000, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shift", [1, 2])
def test_shift_moves_each_image_and_fills_with_background(test_split, shift):
    images = test_split[0][:1000]
    shifted = augmented(images, shift=shift)
    padded, places = torch.nn.functional.pad(images, [shift] * 4), range(2 * shift + 1)
    windows = [padded[:, :, y : y + 28, x : x + 28] for y in places for x in places]
    hits = torch.stack([(window == shifted).flatten(1).all(dim=1) for window in windows])
    assert hits.any(dim=0).all()  # each image is one of its windows, at a place of its own
    expected = 1000 / len(windows)
    counts = hits.sum(dim=1)
    assert (counts > 0.5 * expected).all() and (counts < 1.7 * expected).all()


@pytest.fixture(scope="module")
def boxes():
    """Height, width, top and left of what is erased of 4,000 white images, and each one's noise."""
    images = torch.full((8000, 1, 28, 28), 255, dtype=torch.uint8)
    result = augmented(images, erase=0.5)[:, 0]
    found = []
    for image in result[(result != 255).flatten(1).any(dim=1)]:
        rows, columns = ((image != 255).any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        top, left = rows[0].item(), columns[0].item()
        height, width = rows[-1].item() - top + 1, columns[-1].item() - left + 1
        found.append((height, width, top, left, image[top : top + height, left : left + width]))
    return found


def test_erase_takes_the_asked_share_of_the_images(boxes):
    assert 3800 < len(boxes) < 4200
    black = torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)
    assert 70 < augmented(black, erase=0.1).flatten(1).any(dim=1).sum() < 130


def test_erase_replaces_one_rectangle_by_noise(boxes):
    noise = torch.cat([box[4].flatten() for box in boxes])
    histogram = noise.bincount(minlength=256) / len(noise)
    # nothing in it is left as it was
    assert len(histogram) == 256 and (histogram - 1 / 256).abs().max() < 0.1 / 256
    assert accuracy_score(noise[1:], noise[:-1]) < 0.01  # and no stretch of one value


def test_erase_takes_2_to_33_percent_of_the_area_in_any_proportion_up_to_3_3(boxes):
    # Sides are rounded, so the bounds are met to within half a pixel; an edge row may be 255 by
    # chance.
    areas = torch.tensor([height * width / 784 for height, width, *_ in boxes])
    assert 0.012 < areas.min() < 0.025 and 0.31 < areas.max() < 0.35
    assert areas.mean().item() == pytest.approx(0.175, abs=0.005)  # uniform from 0.02 to 0.33
    large = [
        math.log(height / width)
        for height, width, *_ in boxes
        if 12 * 12 < height * width < 15 * 15
    ]
    aspects = torch.tensor(large)
    assert aspects.abs().max() < math.log(3.3) + 0.15 and aspects.abs().max() > math.log(3.3) - 0.15
    assert (
        aspects.mean().abs() < 0.1
        and (aspects.abs() < math.log(3.3) / 2).float().mean().sub(0.5).abs() < 0.06
    )


def test_an_erased_rectangle_may_lie_anywhere_within_the_image(boxes):
    for size, place in ((0, 2), (1, 3)):
        free = torch.tensor([box[place] / (28 - box[size]) for box in boxes if box[size] < 12])
        assert free.min() == 0 and free.max() == 1  # from edge to edge
        assert free.mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_larger_area_may_be_erased():
    sizes = [
        (image != 255).sum().item()
        for image in augmented(
            torch.full((2000, 1, 28, 28), 255, dtype=torch.uint8), erase=1.0, erase_area=0.8
        )
    ]
    assert 0.75 * 784 < max(sizes) < 0.85 * 784


def test_an_eighth_of_the_images_is_rotated_about_their_centre_by_up_to_the_angle():
    images = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 13:15, 22:25] = 255  # 9.5 pixels to the right of the centre
    turned = augmented(images, rotate=30.0)[:, 0].double()
    still = (turned == images[:, 0]).flatten(1).all(dim=1)
    assert still.double().mean() == pytest.approx(7 / 8, abs=0.02)
    y, x = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    cy, cx = ((turned * axis).sum(dim=(1, 2)) / turned.sum(dim=(1, 2)) for axis in (y, x))
    assert torch.hypot(cx, cy)[~still].tolist() == pytest.approx(
        [9.5] * int((~still).sum()), abs=0.2
    )
    angles = torch.rad2deg(torch.atan2(cy, cx))[~still]
    assert angles.abs().max() == pytest.approx(
        30, abs=0.7
    ) and angles.abs().mean() == pytest.approx(15, abs=1)
    assert angles.mean() == pytest.approx(0, abs=2.5)


def test_a_turned_image_is_what_opencv_makes_of_it(test_split):
    image = test_split[0][5:6]
    variants = augmented(image.repeat(40, 1, 1, 1), rotate=40.0)
    turned = variants[(variants != image).flatten(1).any(dim=1)]
    fits = []
    for tenths in range(-400, 401):
        matrix = cv2.getRotationMatrix2D((13.5, 13.5), tenths / 10, 1.0)
        fits.append(
            np.abs(
                cv2.warpAffine(image[0, 0].numpy(), matrix, (28, 28)) - turned[0, 0].float().numpy()
            ).mean()
        )
    assert min(fits) < 1.5 and 1 < abs(int(np.argmin(fits)) - 400) < 400


def test_an_eighth_of_the_images_gets_noise_of_up_to_the_deviation():
    plain = (torch.full((2000, 1, 28, 28), value, dtype=torch.uint8) for value in (128, 0))
    gray, black = (augmented(images, noise=0.1) for images in plain)
    deviations = gray.float().std(dim=(1, 2, 3)) / 255
    noisy = deviations > 0
    assert noisy.double().mean() == pytest.approx(1 / 8, abs=0.02)
    assert deviations.max() == pytest.approx(0.1, abs=0.01)
    assert deviations[noisy].mean() == pytest.approx(0.05, abs=0.004)
    assert gray.double().mean() == pytest.approx(128, abs=0.2)
    # below black there is nothing, nor does it wrap round
    assert black.max() < 160 and black.double().mean() < 5


def test_cutmix_puts_a_rectangle_of_the_image_before_and_mixes_the_targets_by_its_area():
    n = 250
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 28, 28)
    mixed, targets = dataset.cutmix(images, torch.eye(n), torch.Generator().manual_seed(0), 0.8)
    shares = []
    for i, image in enumerate(mixed[:, 0]):
        inside = image != i
        share, before = inside.double().mean().item(), (i - 1) % n
        assert (image[inside] == before).all()
        assert (targets[i, i].item(), targets[i, before].item()) == pytest.approx(
            (1 - share, share), abs=1e-6
        )
        rows, columns = inside.any(dim=1).sum(), inside.any(dim=0).sum()
        assert rows * columns == inside.sum()  # a rectangle
        shares.append(share)
    shares = np.array(shares)
    assert (shares > 0).mean() == pytest.approx(0.8, abs=0.07)
    assert shares[shares > 0].mean() == pytest.approx(0.45, abs=0.07) and shares.max() > 0.85


def test_the_same_generator_state_gives_the_same_batch(test_split):
    images = test_split[0][:50]
    options = dict(flip=True, shift=2, erase=0.5)
    before = images.clone()
    assert torch.equal(augmented(images, **options), augmented(images, **options))
    assert torch.equal(images, before)
