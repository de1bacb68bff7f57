import gzip
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import hostile
import pytest
import torch
from conftest import ROOT

import dataset


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No source of the data set but those a test makes."""

    def refuse(names, scratch):
        raise dataset.DataError("not in this test")

    monkeypatch.setattr(dataset, "_from_mirrors", refuse)
    monkeypatch.setattr(dataset, "_from_apt", refuse)
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "no-such-folder")


@pytest.fixture
def copy(data_dir, tmp_path):
    """A copy of the data folder that a test may damage."""
    shutil.copytree(data_dir / "FashionMNIST" / "raw", tmp_path / "copy" / "FashionMNIST" / "raw")
    return tmp_path / "copy"


def test_the_splits_are_the_published_ones(data_dir, test_split):
    images, labels = dataset.load(data_dir, train=True)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [6000] * 10
    assert test_split[0].shape == (10_000, 1, 28, 28)
    assert test_split[1].bincount().tolist() == [1000] * 10


def test_mean_and_std_are_those_of_the_training_split(data_dir):
    pixels = dataset.load(data_dir, train=True)[0].double() / 255
    assert dataset.MEAN == pytest.approx(pixels.mean().item(), abs=5e-5)
    assert dataset.STD == pytest.approx(pixels.std().item(), abs=5e-5)


@pytest.mark.parametrize("damage", hostile.DAMAGE)
@pytest.mark.parametrize("name", dataset.FILES)
def test_a_damaged_file_is_refused_or_repaired(data_dir, offline, tmp_path, capsys, name, damage):
    folder = hostile.damaged_data(tmp_path / "damaged", data_dir, name, damage)
    raw, good = folder / hostile.RAW, (data_dir / hostile.RAW / name).read_bytes()
    bad = (raw / name).read_bytes()
    assert bad != good
    for train in (True, False):
        with pytest.raises(dataset.DataError, match=f"lacks {name}"):
            dataset.load(folder, train)
    assert (raw / name).read_bytes() == bad
    (folder / f"{name}.gz").write_bytes(gzip.compress(good, 1))  # another source: as a person may put it there
    capsys.readouterr()
    dataset.prepare(folder)
    assert (raw / name).read_bytes() == good
    assert capsys.readouterr().err.count(f"{raw / name} is damaged") == 1
    assert sorted(path.name for path in raw.iterdir()) == sorted(dataset.FILES)


def test_a_half_downloaded_archive_is_refused(copy, offline, capsys):
    file = copy / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    archive = gzip.compress(file.read_bytes())
    file.with_name(f"{file.name}.gz").write_bytes(archive[: len(archive) // 2])
    file.unlink()
    with pytest.raises(dataset.DataError) as error:
        dataset.prepare(copy)
    assert not file.exists()
    assert f"{file}.gz is damaged" in capsys.readouterr().err
    for way in ("data folder", "Debian's package", "mirrors", "apt"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mirror_that_sends_something_else_is_passed_over(copy, tmp_path, monkeypatch):
    raw, served = copy / "FashionMNIST" / "raw", tmp_path / "served"
    served.mkdir()
    for name in ("t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte"):
        (served / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/bad/"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>please log in</html>")
            else:
                super().do_GET()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "no-such-folder")
    monkeypatch.setattr(dataset.FashionMNIST, "mirrors", [f"{address}/bad/", f"{address}/"])
    monkeypatch.setattr(dataset, "_from_apt", lambda names, scratch: pytest.fail("the second mirror was enough"))
    try:
        assert len(dataset.load(copy, train=False)[0]) == 10_000
    finally:
        server.shutdown()
        server.server_close()


def test_without_mirrors_the_package_is_fetched_with_private_lists_and_unpacked(copy, tmp_path, monkeypatch):
    raw, package, commands = copy / "FashionMNIST" / "raw", tmp_path / "package", tmp_path / "bin"
    monkeypatch.setattr(dataset, "DEBIAN_FOLDER", tmp_path / "not-installed")
    folder = package / dataset.DEBIAN_FOLDER.relative_to("/")
    for path in (folder, commands):
        path.mkdir(parents=True)
    for name in dataset.FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes(), compresslevel=1))
        (raw / name).unlink()
    # Stands in for apt on a machine whose own package lists are empty.
    (commands / "apt-get").write_text(
        'case "$*" in *Dir::State*update) touch lists/updated;; '
        "*Dir::State*download*) test -e lists/updated && touch a.deb;; *) exit 100;; esac"
    )
    (commands / "dpkg-deb").write_text(f'cp -r "{package}/." "$3"')
    for command in commands.iterdir():
        command.write_text(f"#!/bin/sh\n{command.read_text()}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(dataset.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(dataset.load(copy, train=False)[0]) == 10_000


def test_two_processes_that_start_at_once_both_get_the_data(copy, tmp_path):
    target = tmp_path / "target"
    code = (
        f"import dataset, pathlib; dataset.DEBIAN_FOLDER = pathlib.Path({str(copy / 'FashionMNIST' / 'raw')!r}); "
        f"print(len(dataset.load({str(target)!r}, train=False)[0]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["10000", "10000"]
    assert sorted(path.name for path in (target / "FashionMNIST" / "raw").iterdir()) == sorted(dataset.FILES)


def test_the_validation_split_is_stratified_and_disjoint(data_dir):
    labels = dataset.load(data_dir, train=True)[1]
    train, val = dataset.split_indices(labels, 5000, seed=0)
    assert labels[val].bincount().tolist() == [500] * 10
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(60_000))
    assert torch.equal(val, dataset.split_indices(labels, 5000, seed=0)[1])
    assert not torch.equal(val, dataset.split_indices(labels, 5000, seed=1)[1])
    assert [len(part) for part in dataset.split_indices(labels, 0, seed=0)] == [60_000, 0]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 28, 28, dtype=torch.uint8)])
def test_normalize_refuses_what_the_model_would_misread(wrong):
    with pytest.raises(ValueError, match="expected uint8 images of shape"):
        dataset.normalize(wrong)


def augmented(images, **options):
    settings = dict(flip=False, shift=0, erase=0.0) | options
    return dataset.augment(images, torch.Generator().manual_seed(7), **settings)


def test_flip_mirrors_about_half_of_the_images(test_split):
    images = test_split[0][:200]
    flipped = augmented(images, flip=True)
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert 60 < (mirrored & ~same).sum() < 140


def test_shift_moves_each_image_and_fills_with_background(test_split):
    images = test_split[0][:200]
    shifted = augmented(images, shift=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = [padded[:, :, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
    hits = torch.stack([(window == shifted).flatten(1).all(dim=1) for window in windows])
    assert hits.any(dim=0).all()
    assert hits.any(dim=1).all()  # every one of the 25 positions occurs


def test_erase_replaces_one_rectangle_of_bounded_size():
    images = torch.full((400, 1, 28, 28), 255, dtype=torch.uint8)
    changed = augmented(images, erase=0.5)[:, 0] != 255
    is_changed = changed.flatten(1).any(dim=1)
    assert 140 < is_changed.sum() < 260
    for mask in changed[is_changed]:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 * 784 < box < 0.4 * 784
        assert mask.sum() > 0.9 * box  # noise is 255 by chance only once in 256


def test_the_same_generator_state_gives_the_same_batch(test_split):
    images = test_split[0][:50]
    options = dict(flip=True, shift=2, erase=0.5)
    assert torch.equal(augmented(images, **options), augmented(images, **options))
    assert torch.equal(images, test_split[0][:50])
