import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import dataset
import train
from model import load_checkpoint

try:
    import Visulization
except SystemExit as missing:  # OpenCV without libGL.so.1: the message says what to install
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
def garment(test_split):
    """The first test image that fills its frame from edge to edge one way, as uint8 (28, 28)."""
    return test_split[0][0, 0].numpy()


def picture_of(image: np.ndarray, kind: str) -> Image.Image:
    """An image of the data set as a person's picture of it might be."""
    large = Image.fromarray(image).resize((280, 280), Image.Resampling.NEAREST)
    gray = np.asarray(large)
    if kind == "light background":
        return Image.fromarray(255 - gray)
    if kind == "colour, off-centre":
        canvas = Image.new("RGB", (700, 400), "black")
        canvas.paste(large.convert("RGB"), (390, 20))
        return canvas
    if kind == "alpha":
        rgba = np.dstack([255 - gray] * 3 + [(gray > 12).astype(np.uint8) * 255])
        return Image.fromarray(rgba)
    if kind == "16 bit":
        return Image.fromarray(gray.astype(np.uint16) * 257)
    if kind == "palette":
        return large.convert("P")
    if kind == "cmyk":
        return Image.fromarray(255 - gray).convert("RGB").convert("CMYK")
    return large


@pytest.mark.parametrize(
    "kind", ["dark background", "light background", "colour, off-centre", "alpha", "16 bit", "palette", "cmyk"]
)
def test_pictures_of_a_garment_come_out_like_the_data_set_has_it(garment, tmp_path, kind):
    path = tmp_path / ("a.tiff" if kind == "cmyk" else "a.png")
    picture_of(garment, kind).save(path)
    found = Visulization.read_image(path)
    rows, columns = np.flatnonzero((found > 0).any(axis=1)), np.flatnonzero((found > 0).any(axis=0))
    assert found.shape == (28, 28) and found.dtype == np.uint8
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 28
    model = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]
    logits = train.predict(model, torch.from_numpy(np.stack([garment, found]))[:, None])
    assert logits[0].argmax() == logits[1].argmax()


@pytest.mark.parametrize(
    "garment_gray, background, alpha",
    [(255, 230, None), (20, 110, None), (200, 110, None), (0, 255, None), (255, 0, 0), (0, 0, 0), (128, 0, 0)],
)
def test_a_garment_may_be_lighter_or_darker_than_any_background(tmp_path, garment_gray, background, alpha):
    pixels = np.full((60, 60), background, np.uint8)
    pixels[10:50, 20:40] = garment_gray
    picture = Image.fromarray(pixels)
    if alpha is not None:
        mask = np.full((60, 60), alpha, np.uint8)
        mask[10:50, 20:40] = 255
        picture.putalpha(Image.fromarray(mask))
    picture.save(tmp_path / "a.png")
    found = Visulization.read_image(tmp_path / "a.png")
    assert (found[:, 7:21] > 70).all()  # twice as tall as wide, centred
    assert not found[:, :7].any() and not found[:, 21:].any()


def test_a_float_picture_is_scaled_by_its_range(tmp_path):
    pixels = np.zeros((50, 50), np.float32)
    pixels[5:45, 5:45] = 0.8
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    assert Visulization.read_image(tmp_path / "a.tiff").max() == 204


def test_most_test_images_survive_the_way_through_a_file(test_split, tmp_path):
    images, _ = (part[:100] for part in test_split)
    found = []
    for i, image in enumerate(images[:, 0].numpy()):
        Image.fromarray(255 - image).resize((112, 112), Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
        found.append(Visulization.read_image(tmp_path / f"{i}.png"))
    model = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]
    before = train.predict(model, images).argmax(dim=1)
    after = train.predict(model, torch.from_numpy(np.stack(found))[:, None]).argmax(dim=1)
    assert (before == after).sum() >= 85


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3)])
def test_odd_sizes_are_read(tmp_path, size):
    picture = Image.new("L", size, 0)
    picture.putpixel((0, size[1] // 2), 255)
    picture.save(tmp_path / "a.png")
    if size == (1, 1):
        with pytest.raises(ValueError, match="one even colour"):
            Visulization.read_image(tmp_path / "a.png")
    else:
        assert Visulization.read_image(tmp_path / "a.png").any()


def test_the_heatmap_is_laid_over_sharp_pixels(garment):
    heatmap = np.zeros((28, 28), np.float32)
    gray, colored, overlay = Visulization.paint(garment, heatmap)
    assert gray.shape == colored.shape == overlay.shape == (336, 336, 3)
    assert np.array_equal(gray[::12, ::12, 0], garment) and np.array_equal(gray[11::12, 11::12, 0], garment)
    assert np.array_equal(overlay, gray)  # nothing hot, nothing painted
    heatmap[14, 14] = 1
    overlay = Visulization.paint(garment, heatmap)[2]
    changed = np.argwhere((overlay != gray).any(axis=2))
    assert changed.min() >= 13 * 12 and changed.max() < 16 * 12


def test_the_script_fills_the_folder_with_the_shipped_model(run_script, data_dir, tmp_path):
    result = run_script("Visulization.py", "--num-images", 1, "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "HeapImg").iterdir())
    assert len(names) == 11 and names[-1] == "contact_sheet.png"
    trues = {name.split("_")[1] for name in names[:-1]}
    assert trues == {Visulization.slug(name) for name in dataset.CLASS_NAMES}
    with Image.open(tmp_path / "HeapImg" / names[0]) as picture:
        assert min(picture.size) >= 300


def test_errors_of_one_class_can_be_picked(run_script, data_dir, tmp_path):
    flags = ["--only-errors", "--classes", "shirt", "--num-images", 2, "--target-class", "Shirt", "--seed", 3]
    result = run_script("Visulization.py", *flags, "--target-layer", "blocks.0", "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    names = [path.stem.split("_") for path in (tmp_path / "HeapImg").glob("0*.png")]
    assert len(names) == 2
    assert all(true == "Shirt" and predicted != "Shirt" for _, true, _, predicted in names)


def test_the_worst_errors_are_on_one_sheet(run_script, data_dir, tmp_path, test_split, monkeypatch):
    flags = ["--worst", 5, "--classes", "Shirt", "--data-dir", data_dir]
    result = run_script("Visulization.py", *flags)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "HeapImg").iterdir()] == ["worst.png"]
    # The captions tell which images they are: they must be wrong, and none left out may be more confident.
    rows: dict = {}
    monkeypatch.setattr(Visulization, "save_contact_sheet", lambda cells, title, path: rows.update(cells))
    monkeypatch.setattr("sys.argv", ["Visulization.py", *map(str, flags), "--output-dir", str(tmp_path)])
    Visulization.main()
    shown = [int(caption.split(":")[0]) for row in rows.values() for _, caption, _ in row]
    images, labels = test_split
    p = train.predict(load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0], images).softmax(dim=1)
    wrong = [i for i in (labels == 6).nonzero().flatten().tolist() if p[i].argmax() != 6]
    assert shown == sorted(wrong, key=lambda i: -p[i].max().item())[:5]


def test_own_pictures_one_bad_file_does_not_stop_the_others(run_script, garment, tmp_path):
    picture_of(garment, "light background").save(tmp_path / "my shoe ü.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "my shoe ü.png").read_bytes()[:200])
    (tmp_path / "my shoe ü.png").rename(tmp_path / "my $^$ shoe ü.png")  # matplotlib would read $^$ as a formula
    files = ["text.png", "cut.jpg", "missing.png", "my $^$ shoe ü.png"]
    result = run_script("Visulization.py", "--image", *files)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == files[:3]
    assert "3 of 4 pictures" in lines[3] and len(lines) == 4
    assert result.stdout.startswith("my $^$ shoe ü.png: Ankle boot ") and result.stdout.count("%") == 3
    assert [path.name for path in (tmp_path / "HeapImg").iterdir()] == ["my $^$ shoe ü_as_Ankle-boot.png"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint", "nothing.pt"], "nothing.pt is not a file"),
        (["--target-layer", "blocks.77"], "no layer 'blocks.77'"),
        (["--target-layer", "head"], "neither a map"),
        (["--target-layer", "blocks"], "does not go through the target layer"),
        (["--classes", "Hat"], "'Hat' is none of"),
        (["--num-images", "0"], "--num-images"),
    ],
)
def test_errors_are_one_clear_line(run_script, data_dir, flags, words):
    result = run_script("Visulization.py", *flags, "--data-dir", data_dir)
    assert result.returncode != 0 and words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_missing_libgl_is_explained():
    code = "import sys; sys.modules['cv2'] = None; import Visulization"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "pip install opencv-python-headless" in result.stderr
    assert len(result.stderr.splitlines()) == 1
