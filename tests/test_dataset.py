import gzip
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import write_data
from torch.nn.functional import pad
from torchvision.datasets import FashionMNIST

import dataset
from common.files import UserError

NAMES = tuple(dataset.FILES)
IMAGES = torch.arange(3 * 784).remainder(251).byte().view(3, 1, 28, 28)
LABELS = torch.tensor([7, 0, 9])
ARCHIVES = sorted(f"{name}.gz" for name in NAMES)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A data set of three images each way; no source has it but what a test makes."""
    folder = tmp_path / "good"
    hashes = write_data(folder, "train", IMAGES, LABELS)
    hashes |= write_data(folder, "t10k", IMAGES.flip(0), LABELS.flip(0))
    monkeypatch.setattr(dataset, "FILES", hashes)
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setattr(dataset, "MIRRORS", [])
    monkeypatch.setenv("PATH", str(tmp_path / "no-such-folder"))
    return folder


def packed(folder, target):
    """The files of a folder, compressed into another one."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return target


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_is_tiny(folder):
    for train, order in ((True, [0, 1, 2]), (False, [2, 1, 0])):
        images, labels = dataset.load(folder, train)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, IMAGES[order]) and torch.equal(labels, LABELS[order])


def test_the_splits_are_the_published_ones(data_dir, test_split):
    images, labels = dataset.load(data_dir, train=True)
    assert images.shape == (60_000, 1, 28, 28) and len(test_split[0]) == 10_000
    assert list(dataset.CLASS_NAMES) == FashionMNIST.classes
    pixels = images.double() / 255
    assert pixels.mean().item() == pytest.approx(dataset.MEAN, abs=5e-5)
    assert pixels.std().item() == pytest.approx(dataset.STD, abs=5e-5)
    # Otherwise those that learn from the shipped model would be trained on its validation images.
    val = dataset.split_indices(labels, 5000, seed=0)[1]
    assert (val[:5].tolist(), val.sum().item()) == ([1, 14, 16, 25, 30], 147_303_911)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_files_are_read_where_they_lie_and_nothing_is_written(tiny, tmp_path, monkeypatch, place):
    folder = packed(tiny, tmp_path / "packed" / place)
    assert_is_tiny(tmp_path / "packed")
    (folder / f"{NAMES[0]}.gz").unlink()
    (tiny / NAMES[0]).rename(folder / NAMES[0])  # not compressed
    (folder / NAMES[1]).mkdir()  # what was unpacked into a folder of its own
    (folder / f"{NAMES[3]}.gz").rename(folder / NAMES[3])  # compressed
    before = contents(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is_tiny("~/packed")
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", folder)
    assert_is_tiny(tmp_path / "empty")
    assert contents(folder) == before and not (tmp_path / "empty").exists()


def test_another_file_stops_and_is_left_as_it_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tiny)  # nor is an installed package taken
    path = tmp_path / f"{NAMES[1]}.gz"
    packed = gzip.compress((tiny / NAMES[1]).read_bytes())
    for wrong in (b"<html>", gzip.compress(b"another"), packed[:-20], packed[:10] + b"\xff" * 9):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=f"{path} is damaged, or not of Fashion-MNIST: "):
            dataset.load(tmp_path, train=True)
        assert path.read_bytes() == wrong


@pytest.fixture
def mirrors(tiny, tmp_path, monkeypatch):
    """One that is missing, one that sends another page, one that has the files."""
    packed(tiny, tmp_path / "mirror")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / f"{NAMES[0]}.gz").write_text("<html>please log in</html>")
    found = [f"{(tmp_path / name).as_uri()}/" for name in ("missing", "bad", "mirror")]
    monkeypatch.setattr(dataset, "MIRRORS", found)
    return found


@pytest.fixture
def apt(tiny, tmp_path, monkeypatch):
    """Stands in for apt on a machine whose own package lists are empty."""
    commands, package = tmp_path / "bin", tmp_path / "package"
    commands.mkdir()
    packed(tiny, package / dataset.DEBIAN_FOLDER.relative_to("/"))
    (commands / "apt-get").write_text(
        'case "$*" in *Dir::State*update) touch updated;; '
        "*Dir::State*download*) test -e updated && touch a.deb;; *) exit 100;; esac"
    )
    (commands / "dpkg-deb").write_text(f'[ "$1 $2" = "-x a.deb" ] && cp -r "{package}/." "$3"')
    for command in commands.iterdir():
        command.write_text(f"#!/bin/sh\n{command.read_text()}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.defpath}")
    return package


def test_a_mirror_that_sends_something_else_is_passed_over(mirrors, tmp_path, capsys):
    folder = tmp_path / "new" / "data"
    assert_is_tiny(folder)
    assert contents(folder) == contents(tmp_path / "mirror")
    assert f"downloading {mirrors[1]}{NAMES[0]}.gz" in capsys.readouterr().err


def test_without_a_mirror_the_package_is_fetched_once(mirrors, apt, tmp_path):
    del mirrors[2]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ARCHIVES[0]).write_text("mine")  # of the other split
    dataset.load(folder, train=True)
    assert sorted(contents(folder)) == ARCHIVES
    assert (folder / ARCHIVES[0]).read_text() == "mine"


def test_what_no_source_has_is_named_with_every_reason(mirrors, apt, tmp_path):
    del mirrors[2]
    archive = next(apt.rglob(f"{NAMES[0]}.gz"))
    archive.write_bytes(gzip.compress(b"another data set"))
    with pytest.raises(UserError, match=f"no good copy of {NAMES[0]}") as error:
        dataset.load(tmp_path / "data", train=True)
    reasons = "No such file", "Not a gzipped file", "the download is not the published file"
    for words in (*reasons, "the four .gz files of https:"):
        assert words in str(error.value)
    assert not (tmp_path / "data").exists()


def test_the_validation_split_is_stratified_and_disjoint():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))  # 10 of class 0
    train, val = dataset.split_indices(labels, 55, seed=0)
    assert labels[val].bincount().tolist() == list(range(1, 11))  # a tenth of each
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(550))
    assert not torch.equal(val, dataset.split_indices(labels, 55, seed=1)[1])
    everything, nothing = dataset.split_indices(labels, 0, seed=0)
    assert torch.equal(everything, torch.arange(550)) and nothing.tolist() == []


def test_normalize_by_hand():
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([255, 51])
    x = dataset.normalize(images)
    expected = [(1 - 0.2860) / 0.3530, (0.2 - 0.2860) / 0.3530, -0.2860 / 0.3530]
    assert x.dtype == torch.float32 and x[0, 0, 0, :3].tolist() == pytest.approx(expected)
    for wrong in (images.float(), images[0]):  # which the model would misread
        with pytest.raises(ValueError, match="expected uint8 images"):
            dataset.normalize(wrong)


def augmented(images, **options):
    settings = dict(flip=False, alternate_flip=False, shift=0, erase=0.0, erase_area=0.33)
    settings |= dict(rotate=0.0, noise=0.0, stretch=1.0) | options
    config = SimpleNamespace(**settings)
    return dataset.augment(images, torch.Generator().manual_seed(7), config)


def full_of(value, number):
    return torch.full((number, 1, 28, 28), value, dtype=torch.uint8)


def test_the_generator_decides_and_the_images_stay(test_split):
    images = test_split[0][:50].clone()
    options = dict(flip=True, shift=2, erase=0.5, rotate=15.0, noise=0.1, stretch=1.3)
    variants = augmented(images, **options)
    assert torch.equal(images, test_split[0][:50]) and torch.equal(augmented(images), images)
    assert torch.equal(augmented(images, **options), variants)
    gray = images.expand(50, 3, 28, 28)  # three channels
    options = dict(flip=True, shift=3, stretch=1.3)
    assert (augmented(gray, **options) == augmented(images, **options)).all()


def test_flips_alternate(test_split):
    images, mirrored = test_split[0][:1000], []
    assert torch.equal(augmented(images, flip=True, alternate_flip=True), images)
    flipped = [augmented(images, flip=True)]
    for epoch in range(3):
        generator = torch.Generator().manual_seed(7)
        flipped.append(dataset.alternate_flip(images, generator, epoch))
    for variants in flipped:
        mirrored.append((variants == images.flip(3)).flatten(1).all(dim=1))
        assert torch.equal(mirrored[-1], (variants != images).flatten(1).any(dim=1))
        assert 450 < mirrored[-1].sum() < 550
    assert torch.equal(mirrored[2], ~mirrored[1]) and torch.equal(mirrored[3], mirrored[1])


def test_an_order_has_all_hard_images_and_some_easy_ones():
    losses = torch.arange(1000.0)
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([dataset.epoch_order(losses, generator, skipped=500) for _ in range(100)])
    times = orders.flatten().bincount(minlength=1000)
    assert orders.shape == (100, 500) and (times[600:] == 100).all()
    # by chance one of six easy images, which is 17 of 100 times
    assert 0 < times[:600].min() and times[:600].max() < 40
    for part in (orders >= 600).double().split(100, dim=1):  # as many in every part of the epoch
        assert part.mean().item() == pytest.approx(0.8, abs=0.02)


def test_shift_moves_each_image_and_fills_with_background(test_split):
    images = test_split[0][:1000]
    shifted, padded = augmented(images, shift=2), pad(images, [2] * 4)
    windows = [padded[:, :, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
    hits = torch.stack([(window == shifted).flatten(1).all(dim=1) for window in windows])
    assert hits.any(dim=0).all()  # each image is one of its windows, at a place of its own
    assert 20 < hits.sum(dim=1).min() and hits.sum(dim=1).max() < 68  # 40 by chance


def test_erase_fills_rectangles_of_the_given_areas_with_noise():
    images = augmented(full_of(255, 8000), erase=0.5, erase_area=0.25)[:, 0]
    images = images[(images != 255).flatten(1).any(dim=1)]
    assert 3800 < len(images) < 4200
    rows, columns = (images != 255).any(dim=2), (images != 255).any(dim=1)
    noise = images[rows[:, :, None] & columns[:, None]]
    histogram = noise.bincount(minlength=256) / len(noise)
    assert (histogram - 1 / 256).abs().max() < 0.1 / 256
    # Sides are rounded, and an edge row may be 255 by chance.
    height, width = rows.sum(dim=1), columns.sum(dim=1)
    shares = height * width / 784
    assert 0.012 < shares.min() < 0.025 and 0.23 < shares.max() < 0.27
    assert shares.mean().item() == pytest.approx(0.135, abs=0.005)  # uniform
    aspects = (height / width)[shares > 0.18].log() / math.log(3.3)
    assert aspects.abs().max().item() == pytest.approx(1, abs=0.12)
    assert aspects.mean().abs() < 0.08  # tall and wide are as likely
    for lines, size in ((rows, height), (columns, width)):  # from edge to edge
        free = (lines.int().argmax(dim=1) / (28 - size))[size < 12]
        assert (free.min(), free.max()) == (0, 1) and (free.mean() - 0.5).abs() < 0.03


def test_an_eighth_of_the_images_is_rotated():
    images = full_of(0, 2000)
    images[:, 0, 13:15, 22:25] = 255  # 9.5 pixels to the right of the centre
    turned = augmented(images, rotate=30.0)
    turned = turned[(turned != images).flatten(1).any(dim=1), 0].double()
    assert len(turned) / 2000 == pytest.approx(1 / 8, abs=0.02)
    place, total = torch.arange(28).double() - 13.5, turned.sum(dim=(1, 2))
    y, x = turned.sum(dim=2) @ place / total, turned.sum(dim=1) @ place / total
    assert (torch.hypot(x, y) - 9.5).abs().max() < 0.2
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().max() == pytest.approx(30, abs=0.7)
    assert angles.abs().mean() == pytest.approx(15, abs=1) and angles.mean().abs() < 2.5


def test_an_eighth_of_the_images_gets_noise():
    gray, black = (augmented(full_of(value, 2000), noise=0.1) for value in (128, 0))
    deviations = gray.float().std(dim=(1, 2, 3)) / 255
    noisy = deviations > 0
    assert noisy.double().mean() == pytest.approx(1 / 8, abs=0.02)
    assert deviations.max() == pytest.approx(0.1, abs=0.01)
    assert deviations[noisy].mean() == pytest.approx(0.05, abs=0.004)
    assert black.max() < 160 and black.double().mean() < 5  # it does not wrap round


def test_cutmix_mixes_the_targets_by_the_area_of_the_image_before():
    n = 250
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 28, 28)
    mixed, targets = dataset.cutmix(images, torch.eye(n), torch.Generator().manual_seed(0), 0.8)
    inside = mixed != images
    assert torch.equal(mixed[inside], images.roll(1, 0)[inside])
    shares = inside.double().mean(dim=(1, 2, 3))
    expected = torch.diag(1 - shares) + torch.diag(shares).roll(-1, 1)
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-6)
    is_mixed = shares > 0
    assert is_mixed.double().mean().item() == pytest.approx(0.8, abs=0.07)
    assert shares[is_mixed].mean().item() == pytest.approx(0.45, abs=0.07) and shares.max() > 0.85


@pytest.mark.parametrize(
    "draw, size, new_size",
    [
        (1.0, (28, 14), (28, 28)),  # height and width: twice as wide
        (1.0, (10, 20), (7, 28)),  # 40 wide, so it is made smaller
        (0.0, (14, 28), (28, 28)),  # 14 high and wide, so it is made larger
    ],
)
def test_a_stretched_garment_fills_the_frame(monkeypatch, draw, size, new_size):
    garment = full_of(0, 1)
    top, left = (28 - size[0]) // 2, (28 - size[1]) // 2
    garment[:, :, top : 28 - top, left : 28 - left] = 200
    monkeypatch.setattr(dataset, "_uniform", lambda *_: torch.full((1, 1, 1, 1), draw))
    # Half a pixel at the frame is mixed with the dark outside.
    found = augmented(garment, stretch=2.0)[0, 0].float() / 200
    sides = found.sum(dim=0).max().item(), found.sum(dim=1).max().item()
    assert sides == pytest.approx(new_size, abs=0.6)


def test_a_file_that_may_not_be_read_is_refused(tiny, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tiny), "read_bytes", refuse)
    with pytest.raises(UserError, match="Permission denied; make it readable"):
        dataset.load(tiny, train=True)
