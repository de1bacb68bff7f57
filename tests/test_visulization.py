import itertools
import random
import subprocess
import sys
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import dataset
import train
from gradcam import GradCAM
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


def test_odd_pictures_are_read_or_refused_in_one_line(garment, tmp_path):
    seen = {"fine": 0, "refused": 0}
    for name, path, expected in hostile.odd_pictures(tmp_path, garment):
        try:
            found = Visulization.read_image(path)
            assert found.shape == (28, 28) and found.dtype == np.uint8 and found.max() > 128, name
            happened = "fine"
        except ValueError as error:
            assert "\n" not in str(error), name
            happened = "refused"
        assert happened == expected, name
        seen[happened] += 1
    assert seen["fine"] > 15 and seen["refused"] > 10


def test_a_mutated_picture_is_read_or_refused_in_one_line(garment, tmp_path):
    generator = random.Random(0)
    good = [
        p for _, p, expected in hostile.odd_pictures(tmp_path, garment) if expected == "fine" and p.stat().st_size < 1e6
    ]
    refused = 0
    for i in range(400):
        path = good[i % len(good)]
        (tmp_path / "mutated").write_bytes(hostile.mutated(path.read_bytes(), generator))
        try:
            assert Visulization.read_image(tmp_path / "mutated").shape == (28, 28)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < 400


def test_the_memory_for_a_picture_is_bounded(garment, tmp_path):
    bombs = [str(path) for name, path, _ in hostile.odd_pictures(tmp_path, garment) if ",000x" in name]
    code = f"""
import resource, Visulization
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
Visulization.read_image({str(tmp_path / "whole.jpg")!r})
print(peak())
for path in {bombs!r}:
    try:
        Visulization.read_image(path)
    except ValueError:
        pass
    print(peak())"""
    outcome = hostile.start(sys.executable, "-c", code, cwd=ROOT)
    before, *after = map(int, outcome.output.split())
    assert len(after) == 3
    assert max(after[:2]) - before < 50  # MiB: nothing is unpacked of those that are refused
    assert after[2] - before < 900  # the largest that is taken


def test_the_heatmap_is_laid_over_sharp_pixels(garment):
    heatmap = np.zeros((28, 28), np.float32)
    heatmap[14, 14] = 1
    gray, colored, overlay = Visulization.paint(garment, heatmap)
    assert gray.shape == colored.shape == overlay.shape == (336, 336, 3)
    assert np.array_equal(gray[::12, ::12, 0], garment) and np.array_equal(gray[11::12, 11::12, 0], garment)
    changed = np.argwhere((overlay != gray).any(axis=2))  # nothing hot, nothing painted
    assert changed.min() >= 13 * 12 and changed.max() < 16 * 12


def test_a_map_without_evidence_is_labelled_in_words_not_stretched():
    gray, colored, overlay = Visulization.paint(np.full((28, 28), 90, np.uint8), np.zeros((28, 28), np.float32))
    assert (gray == 90).all()
    for panel in (colored, overlay):
        assert (
            panel.reshape(-1, 3).max() == 255 and len(np.unique(panel[:80].reshape(-1, 3), axis=0)) == 1
        )  # white words, and nothing above
    maps = Visulization.on_one_scale({0: np.zeros((28, 28)), 1: np.full((28, 28), 1e-9), 2: np.full((28, 28), 1e-5)})
    assert not maps[0].any() and not maps[1].any() and (maps[2] == 1).all()  # a billionth of a logit is rounding


def test_two_classes_are_drawn_on_one_scale():
    spread, peaked = np.full((28, 28), 5.0), np.zeros((28, 28))
    peaked[3, 3], peaked[20, 20] = 3.0, 1.0
    maps = Visulization.on_one_scale({"spread": spread, "peaked": peaked})
    # Three quarters of the evidence are the largest share; 1/784 of it has the colour that it would have there.
    assert maps["peaked"].max() == 1 and maps["peaked"][20, 20] == pytest.approx(1 / 3)
    assert maps["spread"] == pytest.approx(1 / 784 / 0.75)


def test_the_script_fills_the_folder_with_the_shipped_model(run_script, data_dir, tmp_path):
    result = run_script("Visulization.py", "--num-images", 1, "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "HeapImg").iterdir())
    assert len(names) == 11 and names[-1] == "contact_sheet.png"
    trues = {name.split("_")[1] for name in names[:-1]}
    assert trues == {Visulization.slug(name) for name in dataset.CLASS_NAMES}
    with Image.open(tmp_path / "HeapImg" / names[0]) as picture:
        assert min(picture.size) >= 300


@pytest.fixture
def first_thousand(monkeypatch, test_split):
    """Lets the script see the first 1,000 test images alone, which is faster."""
    monkeypatch.setattr(dataset, "load", lambda data_dir, train: tuple(part[:1000] for part in test_split))


def test_errors_of_one_class_can_be_picked(drawn, first_thousand):
    flags = ["--only-errors", "--classes", "shirt", "--num-images", 2, "--target-class", "Shirt", "--seed", 3]
    figures = drawn(*flags, "--target-layer", "blocks.0")
    names = [Path(name).stem.split("_") for name in figures if name != "contact_sheet.png"]
    assert len(names) == 2
    assert all(true == "Shirt" and predicted != "Shirt" for _, true, _, predicted in names)


def test_the_worst_errors_are_on_one_sheet(drawn, first_thousand, test_split, monkeypatch):
    # The captions tell which images they are: they must be wrong, and none left out may be more confident.
    rows: list = []
    monkeypatch.setattr(Visulization, "save_sheet", lambda cells, *rest: rows.extend(cells))
    drawn("--worst", 5, "--classes", "Shirt")
    shown = [int(cell.caption.split(":")[0]) for _, row in rows for cell in row]
    assert all(cell.labels[2] == "for Shirt" != cell.labels[1] for _, row in rows for cell in row)
    images, labels = (part[:1000] for part in test_split)
    p = train.predict(load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0], images).softmax(dim=1)
    wrong = [i for i in (labels == 6).nonzero().flatten().tolist() if p[i].argmax() != 6]
    assert shown == sorted(wrong, key=lambda i: -p[i].max().item())[:5]


@pytest.fixture
def drawn(monkeypatch, data_dir, tmp_path):
    """Runs the script with some flags in this process, and returns each picture's figure by its file name."""
    figures: dict[str, Figure] = {}
    save = Visulization.save_figure

    def keep(figure: Figure, path: Path, dpi: int) -> None:
        figures[path.name] = figure
        save(figure, path, dpi)

    def run(*flags: object) -> dict[str, Figure]:
        everything = [*flags, "--output-dir", tmp_path, *([] if "--image" in flags else ["--data-dir", data_dir])]
        monkeypatch.setattr("sys.argv", ["Visulization.py", *map(str, everything)])
        monkeypatch.setattr(Visulization, "save_figure", keep)
        Visulization.main()
        return figures

    return run


def test_an_error_gets_the_maps_of_both_classes(drawn, tmp_path):
    figures = drawn("--index", 1917, 0, "--save-arrays")
    assert sorted(figures) == ["00000_Ankle-boot_as_Ankle-boot.png", "01917_Coat_as_Shirt.png", "contact_sheet.png"]
    titles = [axes.get_title() for axes in figures["01917_Coat_as_Shirt.png"].axes]
    for title in ("heatmap for Shirt (predicted)", "heatmap for Coat (true)", "overlay for Coat (true)"):
        assert title in titles
    titles = [axes.get_title() for axes in figures["00000_Ankle-boot_as_Ankle-boot.png"].axes]
    assert titles.count("heatmap for Ankle boot (predicted and true)") == 1 and len(titles) == 4
    labels = [text.get_text() for axes in figures["contact_sheet.png"].axes for text in axes.get_xticklabels()]
    assert [label for label in labels if label] == ["for Shirt", "for Coat"]


def test_one_image_is_drawn_through_all_layers(drawn):
    (figure,) = drawn("--index", 1917, "--compare-layers").values()
    captions = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert captions[0] == "stem.stage0_2 + stem.stage1_2"
    assert captions[1] == "stem.first, 28x28" and captions[-1] == "blocks.0, 7x7" and len(captions) == 13
    assert "layercam for Shirt (predicted)" in figure.get_suptitle()


def test_each_class_has_its_mean_map_on_its_mean_image(drawn, first_thousand, test_split, monkeypatch, tmp_path):
    sheets = []
    monkeypatch.setattr(Visulization, "save_sheet", lambda rows, *rest: sheets.append(rows))
    drawn("--average", "--classes", "Shirt", "Coat", "--save-arrays")
    ((_, cells),) = sheets[0]
    images, labels = (part[:1000] for part in test_split)
    counts = labels.bincount().tolist()
    assert [cell.caption.split(" images")[0] for cell in cells] == [f"Shirt: {counts[6]}", f"Coat: {counts[4]}"]
    shirts = images[labels == 6, 0].float().mean(dim=0)
    assert np.abs(cells[0].panels[0][::12, ::12, 0] - shirts.numpy()).max() <= 1
    saved = np.load(tmp_path / "heatmaps.npz")
    means = [(m := saved["maps"][saved["labels"] == k]).mean(axis=0) / m.mean(axis=0).sum() for k in (6, 4)]
    assert (
        len(saved["maps"]) == counts[6] + counts[4] and np.abs(means[0] - means[1]).max() > 0.0005
    )  # 1/784 would be even


@pytest.mark.parametrize("flags", [["--num-images", 3], ["--worst", 24], ["--average"], ["--compare-layers"]])
def test_words_are_legible_where_the_readme_shows_a_sheet(drawn, first_thousand, monkeypatch, flags):
    monkeypatch.setattr(Visulization, "save_overlay", lambda *_: None)
    (figure,) = drawn(*flags).values()
    renderer, bounds = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    figure.draw_without_rendering()
    width = figure.get_size_inches()[0]
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) > 10
    assert min(text.get_fontsize() for text in texts) / 72 / width * 830 >= 10  # pixels, in a page of 830
    captions = [text.get_window_extent(renderer) for axes in figure.axes for text in [axes.title] if text.get_text()]
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 for box in captions)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(captions, 2))


def test_arrays_hold_what_the_pictures_show(drawn, test_split, tmp_path):
    drawn("--index", 1917, 0, 3, "--save-arrays")
    images, labels = test_split
    saved = np.load(tmp_path / "heatmaps.npz", allow_pickle=False)
    index = [1917, 0, 3]
    assert saved["indices"].tolist() == index and saved["labels"].tolist() == labels[index].tolist()
    assert np.array_equal(saved["images"], images[index, 0].numpy())
    model = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]
    p = train.predict(model, images[index]).softmax(dim=1)
    assert saved["probabilities"] == pytest.approx(p.numpy(), abs=1e-5)
    assert saved["predictions"].tolist() == saved["target_classes"].tolist() == p.argmax(dim=1).tolist()
    cam = GradCAM(model, saved["target_layers"].tolist(), str(saved["method"]))
    x = dataset.normalize(images[index])
    for name, targets in (("maps", p.argmax(dim=1)), ("true_maps", labels[index])):
        assert saved[name] == pytest.approx(cam(x, targets, normalize=False).numpy(), rel=1e-3, abs=1e-6)
    assert saved["class_names"].tolist() == list(dataset.CLASS_NAMES)


def test_own_pictures_have_arrays_too(drawn, garment, tmp_path):
    picture_of(garment, "light background").save(tmp_path / "shoe.png")
    drawn("--image", tmp_path / "shoe.png", "--save-arrays", "--method", "gradcam", "--target-layer", "blocks.0")
    saved = np.load(tmp_path / "heatmaps.npz", allow_pickle=False)
    assert saved["names"].tolist() == ["shoe.png"] and saved["labels"].tolist() == saved["indices"].tolist() == [-1]
    assert saved["maps"].shape == (1, 28, 28) and str(saved["method"]) == "gradcam"
    assert saved["target_layers"].tolist() == ["blocks.0"] and not saved["true_maps"].any()


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
        (["--index", "10000"], "argument --index: '10000' is not a whole number from 0 to 9,999"),
        (["--method", "scam"], "--method"),
        (["--average", "--worst", "3"], "not allowed with argument --average"),
        (["--worst", "3", "--target-class", "Shirt"], "--worst shows the predicted and the true class"),
        (["--average", "--html"], "--average covers each class as a whole"),
        (["--compare-layers", "--save-arrays"], "--compare-layers draws one sheet"),
    ],
)
def test_errors_are_one_clear_line(drawn, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        drawn(*flags)
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert words in said and "\n" not in said and stop.value.code


def test_a_missing_libgl_is_explained():
    code = "import sys; sys.modules['cv2'] = None; import Visulization"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "pip install opencv-python-headless" in result.stderr
    assert len(result.stderr.splitlines()) == 1
