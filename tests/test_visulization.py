"""What is explained, what is drawn of it, and what the command line does; photographs have tests of their own."""

import itertools
import os
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import dataset
import train
from gradcam import GradCAM
from model import load_checkpoint, save_checkpoint

try:
    import Visulization
except SystemExit as missing:  # OpenCV without libGL.so.1: the message says what to install
    pytest.skip(str(missing), allow_module_level=True)
from drawing import sheets
from drawing.explanation import Explanation
from drawing.sheets import on_one_scale, paint


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]


@pytest.fixture
def few_images(test_split):
    """What `run` takes for the test split: its first 499 images, and as number 499 its image 1104, an error."""
    index = [*range(499), 1104]
    return tuple(part[index] for part in test_split)


@pytest.fixture
def run(monkeypatch, few_images, tmp_path):
    """Runs Visulization.py in this process, in an empty folder; returns the exit status or the line of an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "load", lambda data_dir, train: few_images)
    monkeypatch.setattr(Visulization, "set_threads", lambda: None)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["Visulization.py", *map(str, flags)])
        try:
            Visulization.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def drawn(monkeypatch):
    """What is on each sheet, by its path, instead of the files, which take half a second each."""
    found = {}

    def keep(rows, title, scale, model_name, path, is_signed=False, gamma=1, width=None):
        cells, names = [cell for _, row in rows for cell in row], [name for name, _ in rows]
        kept = dict(cells=cells, names=names, title=title, scale=scale, model_name=model_name)
        found[str(path)] = SimpleNamespace(**kept, is_signed=is_signed, gamma=gamma)

    monkeypatch.setattr(Visulization, "save_sheet", keep)
    monkeypatch.setattr(sheets, "save_sheet", keep)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Explanations and their arithmetic


def test_an_error_is_explained_for_both_classes_and_the_rest_for_one(shipped, test_split):
    images, labels = (part[[1104, 0, 3]] for part in test_split)
    cam = GradCAM(shipped, ["stem.stage0_2", "stem.stage1_2"], "layercam")
    coat, boot, trouser = Visulization.explain(cam, images, labels, [1104, 0, 3], None)
    assert (coat.target, coat.label, list(coat.heatmaps)) == (6, 4, [6, 4])  # the predicted class first
    assert list(boot.heatmaps) == [9] and list(trouser.heatmaps) == [1]
    assert coat.probabilities == pytest.approx(train.predict(shipped, images)[0].softmax(dim=0).numpy(), abs=1e-6)
    x = dataset.normalize(images[:1])
    for label in (6, 4):
        assert coat.heatmaps[label] == pytest.approx(cam(x, label, normalize=False)[0].numpy(), rel=1e-4, abs=1e-7)
    # For another class than the predicted and the true one.
    coat, boot, _ = Visulization.explain(cam, images, labels, [1104, 0, 3], 2)
    assert list(coat.heatmaps) == [2, 4] and list(boot.heatmaps) == [2, 9]
    assert coat.role(2) == "for Pullover" and coat.role(4) == "for Coat (true)"


def test_a_contrast_is_one_signed_map_of_two_classes(shipped, test_split):
    images, labels = (part[[1104, 0, 3]] for part in test_split)
    cam = GradCAM(shipped, ["stem.stage0_2", "stem.stage1_2"], "layercam")
    p = train.predict(shipped, images).softmax(dim=1)
    shirt, boot, trouser = Visulization.explain(cam, images, labels, [1104, 0, 3], None, versus=4)
    assert (shirt.target, shirt.versus, list(shirt.heatmaps)) == (6, 4, [6]) and boot.versus == trouser.versus == 4
    expected = cam(dataset.normalize(images), p.argmax(dim=1), torch.tensor([4, 4, 4]), normalize=False).numpy()
    for e, heatmap in zip((shirt, boot, trouser), expected, strict=True):
        assert e.heatmaps[e.target] == pytest.approx(heatmap, rel=1e-4, abs=1e-7)
        assert heatmap.min() < 0 < heatmap.max()
    assert shirt.role(6) == "for Shirt, not Coat"
    # Of a class with itself there is no contrast, nor is one asked for by -1: the likeliest other class.
    for versus in (6, -1):
        (shirt,) = Visulization.explain(cam, images[:1], labels[:1], [1104], None, versus)
        assert shirt.versus == p[0].argsort(descending=True)[1]


def test_the_number_of_trust_is_the_probability_without_the_hottest_tenth_and_without_a_random_one(shipped, test_split):
    images, labels = (part[[1104, 0]] for part in test_split)
    cam = GradCAM(shipped, "stem.stage1_2", "layercam")
    random = torch.rand(784, generator=torch.Generator().manual_seed(0)).argsort(descending=True)[:78]
    for e, image in zip(Visulization.explain(cam, images, labels, [1104, 0]), images, strict=True):
        for label, heatmap in e.heatmaps.items():
            expected = []
            for places in (heatmap.ravel().argsort()[::-1][:78].copy(), random):
                hidden = image.clone()
                hidden.view(-1)[places] = 0
                expected.append(train.predict(shipped, hidden[None]).softmax(dim=1)[0, label].item())
            assert e.hidden[label] == pytest.approx(expected, abs=1e-4)
    e.probabilities, e.hidden = np.full(10, 0.934), {9: (0.206, 0.881)}
    assert e.trust(9) == "0.93, without the hottest tenth 0.21, without a random tenth 0.88"
    e.heatmaps[9] = np.zeros((28, 28))
    assert e.trust(9) == ""


def test_the_answer_is_in_words():
    p = np.full(10, 0.01)
    p[6], p[4] = 0.9, 0.03
    assert Explanation("", "", 0, None, 4, p, 6, {}, {}).answer() == "true Coat 3%, predicted Shirt 90%"
    assert Explanation("", "", 0, None, 6, p, 6, {}, {}).answer() == "true Shirt, predicted Shirt 90%"
    own = Explanation("", "", -1, None, -1, p, 6, {}, {})
    assert own.answer() == "predicted Shirt 90%" and own.role(6) == "for Shirt (predicted)"


def test_the_layers_are_all_that_the_image_goes_through_with_their_grids(shipped, small_model):
    for model in (shipped, small_model):
        sides, x = {}, torch.zeros(1, 1, 28, 28)
        for name, layer in model.stem.named_children():
            x = layer(x)
            sides[f"stem.{name}"] = x.shape[-1]
        sides |= {f"blocks.{i}": 7 for i in range(len(model.blocks))}  # 49 tokens
        layers = Visulization.all_layers(model)
        assert layers == sides and list(layers) == list(sides)
        assert [layers[name] for name in Visulization.default_layers(model)] == [28, 14]


def test_two_classes_are_drawn_on_one_scale():
    spread, peaked = np.full((28, 28), 1 / 784), np.zeros((28, 28))
    peaked[3, 3], peaked[20, 20] = 0.75, 0.25
    maps = on_one_scale({"spread": spread, "peaked": peaked})
    # Three quarters of the evidence are the largest share; 1/784 of it has the colour that it would have there.
    assert maps["peaked"].max() == 1 and maps["peaked"][20, 20] == pytest.approx(1 / 3)
    assert maps["spread"] == pytest.approx(1 / 784 / 0.75)


def test_signed_maps_keep_their_sign_on_the_scale_and_have_two_colours():
    heatmap = np.zeros((28, 28))
    heatmap[2, 2], heatmap[25, 25] = 0.25, -0.75
    maps = on_one_scale({0: heatmap})
    assert (maps[0][2, 2], maps[0][25, 25]) == (pytest.approx(1 / 3), -1)
    _, colored, overlay = paint(np.full((28, 28), 90, np.uint8), maps[0], is_signed=True)
    red, blue = colored[30, 30].astype(int), colored[306, 306].astype(int)
    assert red[0] > red[2] + 30 and blue[2] > blue[0] + 100
    assert colored[168, 168].max() < 40 and (overlay[168, 168] == 90).all()  # no evidence either way: black


def test_no_evidence_is_labelled_in_words():
    assert not on_one_scale({0: np.zeros((28, 28))})[0].any()
    gray, colored, overlay = paint(np.full((28, 28), 90, np.uint8), np.zeros((28, 28), np.float32))
    assert (gray == 90).all()
    for panel, background in ((colored, [0, 0, 3]), (overlay, [90, 90, 90])):
        assert (panel[:80] == background).all()  # nothing above the words
        rows = np.flatnonzero((panel == 255).all(axis=(2)).any(axis=1))
        assert 100 < rows.min() and rows.max() < 230


def test_the_heatmap_lies_over_sharp_pixels_the_more_opaque_the_hotter(test_split):
    image = test_split[0][0, 0].numpy()
    spot = np.zeros((28, 28), np.float32)
    spot[14, 14] = 1
    gray, colored, overlay = paint(image, spot)
    assert gray.shape == colored.shape == overlay.shape == (336, 336, 3)
    assert np.array_equal(gray[::12, ::12, 0], image) and np.array_equal(gray[11::12, 11::12, 0], image)
    changed = np.argwhere((overlay != gray).any(axis=2))  # nothing hot, nothing painted
    assert changed.min() >= 13 * 12 and changed.max() < 16 * 12
    # A quarter of the largest share: its colour with an opacity of 0.9 * sqrt(0.25) = 0.45.
    _, colored, overlay = paint(np.full((28, 28), 100, np.uint8), np.full((28, 28), 0.25))
    color = np.array(colormaps["inferno"](0.25)[:3]) * 255  # violet: much red and blue, little green
    assert np.abs(colored - color).max() < 1 and np.abs(overlay - (0.55 * 100 + 0.45 * color)).max() < 2


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_the_pictures_are_where_the_last_line_says(run, capsys, tmp_path):
    assert run("--num-images", 1, "--classes", "bag", 0) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("the pictures are in HeapImg")
    names = sorted(path.name.split("_", 1)[-1] for path in (tmp_path / "HeapImg").iterdir())
    assert names == ["Bag_as_Bag.png", "T-shirt-top_as_T-shirt-top.png", "sheet.png"]
    for path in (tmp_path / "HeapImg").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) >= 400 and picture.convert("L").getextrema() == (0, 255)


def test_an_image_per_row_or_per_class(run, drawn):
    run("--index", 499, 0, 2)  # 499 is image 1104, a coat that is taken for a shirt
    paths = ["00000_Ankle-boot_as_Ankle-boot", "00002_Trouser_as_Trouser", "00499_Coat_as_Shirt", "contact_sheet"]
    assert sorted(drawn) == [f"HeapImg/{name}.png" for name in paths]
    both = drawn["HeapImg/00499_Coat_as_Shirt.png"]
    captions = [cell.caption for cell in both.cells]
    shirt, coat = "for Shirt (predicted)", "for Coat (true)"
    assert len(captions) == 2 and captions[0].startswith(f"{shirt}: 0.81, without the hottest tenth 0.")
    assert captions[1].startswith(f"{coat}: 0.13, without the hottest tenth 0.")
    assert [cell.labels for cell in both.cells] == [["input", "heatmap", "overlay"], ["", "heatmap", "overlay"]]
    boot = drawn["HeapImg/00000_Ankle-boot_as_Ankle-boot.png"]
    role = "for Ankle boot (predicted and true)"
    assert [cell.caption.split(":")[0] for cell in boot.cells] == [role]
    assert boot.model_name == "shipped/model.pt" and boot.title.startswith("test image 0: true Ankle boot, predicted")
    sheet = drawn["HeapImg/contact_sheet.png"]
    assert "layercam of stem.stage0_2 + stem.down1" in sheet.title
    assert sheet.names == ["Trouser", "Coat", "Ankle boot"]
    assert [list(cell.labels) for cell in sheet.cells] == [[], ["", "for Shirt", "for Coat"], []]
    assert [cell.color for cell in sheet.cells] == ["black", "crimson", "black"]
    # On the sheet an error has both overlays: those of its own picture.
    shirt, coat = (cell.panels for cell in both.cells)
    for panel, own in zip(sheet.cells[1].panels, (shirt[0], shirt[2], coat[2]), strict=True):
        assert np.array_equal(panel, own)


def test_images_are_chosen_by_class_seed_and_result(run, drawn, few_images):
    def chosen(*flags):
        drawn.clear()
        assert run("--num-images", 2, "--classes", "Coat", "6", *flags) == 0
        return sorted(path.removeprefix("HeapImg/").removesuffix(".png").split("_") for path in drawn if "_as_" in path)

    first = chosen()
    assert chosen() == first != chosen("--seed", 1)
    for seed in (0, 1):
        found = chosen("--only-errors", "--seed", seed, "--target-class", "shirt", "--target-layer", "blocks.0")
        assert sorted(true for _, true, *_ in found) == ["Coat", "Coat", "Shirt", "Shirt"]
        for i, true, _, predicted, *_ in found:
            assert predicted != true == dataset.CLASS_NAMES[few_images[1][int(i)]]


def test_the_worst_errors_come_first(run, drawn, shipped, few_images):
    run("--worst", 5, "--classes", "Shirt")
    (sheet,) = drawn.values()
    images, labels = few_images
    p = train.predict(shipped, images).softmax(dim=1)
    wrong = [i for i in (labels == 6).nonzero().flatten().tolist() if p[i].argmax() != 6]
    worst = sorted(wrong, key=lambda i: -p[i].max().item())[:5]
    assert [int(cell.caption.split(":")[0]) for cell in sheet.cells] == worst
    assert all(cell.labels[2] == "for Shirt" != cell.labels[1] for cell in sheet.cells)


def test_each_class_has_its_mean_map_on_its_mean_image(run, drawn, shipped, few_images, tmp_path):
    run("--average", "--classes", "Shirt", "Coat", "--save-arrays")
    (sheet,) = drawn.values()
    images, labels = few_images
    predictions = train.predict(shipped, images).argmax(dim=1)
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert saved["labels"].tolist() == saved["target_classes"].tolist() == [x for x in labels.tolist() if x in (4, 6)]
    means = []
    for k in (6, 4):
        maps = saved["maps"][saved["labels"] == k].reshape(-1, 784)
        means.append((maps / maps.sum(axis=1, keepdims=True)).mean(axis=0).reshape(28, 28))
    for k, mean, cell in zip((6, 4), means, sheet.cells, strict=True):
        right = (predictions[labels == k] == k).float().mean()
        assert cell.caption == f"{dataset.CLASS_NAMES[k]}: {(labels == k).sum()} images, {right:.0%} right"
        mean_image = images[labels == k, 0].float().mean(dim=0).numpy()
        assert np.abs(cell.panels[0][::12, ::12, 0] - mean_image).max() <= 0.51
        expected = paint(np.zeros((28, 28), np.uint8), mean / np.max(means))[1]
        assert np.abs(cell.panels[1].astype(int) - expected).max() <= 3


def test_one_image_is_seen_from_every_layer(run, drawn, shipped, few_images):
    run("--index", 499, "--compare-layers", "--method", "gradcam")
    sheet = drawn["HeapImg/00499_Coat_layers.png"]
    captions = [cell.caption for cell in sheet.cells]
    assert captions[:2] == ["stem.stage0_2 + stem.down1", "stem.first, 28x28"] and captions[-1] == "blocks.0, 7x7"
    assert len(captions) == 12 and "gradcam for Shirt (predicted)" in sheet.title and sheet.gamma == 0.5
    x = dataset.normalize(few_images[0][499:])
    layers = [caption.split(",")[0] for caption in captions[1:]]
    maps = [GradCAM(shipped, layer, "gradcam")(x, 6, normalize=False)[0].numpy() for layer in layers]
    maps = [GradCAM(shipped, captions[0].split(" + "), "gradcam")(x, 6, normalize=False)[0].numpy(), *maps]
    peak = max((heatmap / heatmap.sum()).max() for heatmap in maps)
    for cell, heatmap in zip(sheet.cells, maps, strict=True):
        expected = paint(few_images[0][499, 0].numpy(), (heatmap / heatmap.sum() / peak) ** 0.5)
        assert all(np.abs(a.astype(int) - b).max() <= 3 for a, b in zip(cell.panels, expected[1:], strict=True))


def test_a_contrast_is_drawn_with_two_colours_and_named(run, drawn):
    run("--index", 499, 0, "--versus", "coat")
    sheet = drawn["HeapImg/contact_sheet.png"]
    assert sheet.is_signed and "for the other (-1)" in sheet.scale and "overlay for the other" not in sheet.title
    assert [cell.labels for cell in sheet.cells] == [["", "for Shirt, not Coat"], ["", "for Ankle boot, not Coat"]]
    own = drawn["HeapImg/00499_Coat_as_Shirt_not_Coat.png"]
    assert own.is_signed and own.scale == "for Coat (-1), for Shirt (1)" and len(own.cells) == 1
    assert own.cells[0].caption.startswith("for Shirt, not Coat: 0.81, without the hottest tenth")
    reds, blues = (own.cells[0].panels[1][..., channel].astype(int) for channel in (0, 2))
    assert (reds - blues).max() > 40 and (blues - reds).max() > 100
    run("--index", 0, "--target-class", "Coat")
    assert "HeapImg/00000_Ankle-boot_as_Ankle-boot_for_Coat.png" in drawn
    run("--index", 0, "--target-class", "Coat", "--versus", "Bag")
    assert "HeapImg/00000_Ankle-boot_as_Coat_not_Bag.png" in drawn
    run("--worst", 1, "--classes", "Coat", "--versus", "next")
    (cell,) = drawn["HeapImg/worst.png"].cells
    assert cell.labels == ["", "for Shirt, not Coat"] and drawn["HeapImg/worst.png"].is_signed
    run("--index", 499, "--compare-layers", "--versus", "Coat")
    assert drawn["HeapImg/00499_Coat_layers.png"].is_signed


@pytest.mark.parametrize(
    "flags",
    [["--num-images", 3], ["--worst", 24], pytest.param(["--average"], marks=pytest.mark.slow), ["--compare-layers"]],
)
def test_words_are_legible_where_the_readme_shows_a_sheet(run, monkeypatch, flags):
    figures = []
    monkeypatch.setattr(Visulization, "save_overlay", lambda *_: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert run(*flags) == 0
    (figure,) = figures
    renderer, bounds = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) > 10 and "shipped/model.pt" in [text.get_text() for text in texts]
    smallest = min(text.get_fontsize() for text in texts) / 72 / figure.get_size_inches()[0]  # part of the width
    assert smallest * 830 >= 10  # pixels, in a page of 830
    captions = [text.get_window_extent(renderer) for axes in figure.axes for text in [axes.title] if text.get_text()]
    captions += [text.get_window_extent(renderer) for text in (figure._suptitle, figure._supxlabel)]
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 for box in captions)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(captions, 2))


def test_arrays_hold_what_the_pictures_show(run, drawn, shipped, few_images, tmp_path):
    run("--index", 499, 0, 3, "--save-arrays", "--output-dir", "here")
    index = [499, 0, 3]
    images, labels = (part[index] for part in few_images)
    saved = np.load(tmp_path / "here" / "heatmaps.npz", allow_pickle=False)
    assert saved["indices"].tolist() == index and saved["labels"].tolist() == labels.tolist()
    assert saved["names"].tolist() == ["test image 499", "test image 0", "test image 3"]
    assert np.array_equal(saved["images"], images[:, 0].numpy()) and saved["images"].dtype == np.uint8
    p = train.predict(shipped, images).softmax(dim=1)
    assert saved["probabilities"] == pytest.approx(p.numpy(), abs=1e-5)
    assert saved["predictions"].tolist() == saved["target_classes"].tolist() == p.argmax(dim=1).tolist()
    assert saved["target_layers"].tolist() == ["stem.stage0_2", "stem.down1"] and str(saved["method"]) == "layercam"
    cam = GradCAM(shipped, saved["target_layers"].tolist(), "layercam")
    x = dataset.normalize(images)
    for name, targets in (("maps", p.argmax(dim=1)), ("true_maps", labels)):
        assert saved[name] == pytest.approx(cam(x, targets, normalize=False).numpy(), rel=1e-3, abs=1e-6)
    assert saved["class_names"].tolist() == list(dataset.CLASS_NAMES) and saved["versus"].tolist() == [-1] * 3
    run("--index", 499, 0, "--save-arrays", "--versus", "Bag")
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz", allow_pickle=False)
    assert saved["versus"].tolist() == [8, 8] and saved["maps"].min() < 0
    assert not saved["true_maps"].any()  # of image 0, an Ankle boot, the map is a contrast too


# ---------------------------------------------------------------------------------------------------------------------
# One's own pictures and checkpoints


def garment():
    """A trouser-like thing on white."""
    pixels = np.full((90, 60), 255, np.uint8)
    pixels[5:85, 10:50], pixels[30:85, 27:33] = 60, 255
    return Image.fromarray(pixels)


@pytest.mark.filterwarnings("ignore:Glyph")  # pytest shows what the script leaves unsaid
def test_one_bad_file_does_not_stop_the_others(run, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    odd = ["my $^$ shoe ü.png", "обувь 靴.png", "a\nb.png", os.fsdecode(b"sch\xfch.png"), f"{'b' * 251}.png"]
    for name in odd:  # matplotlib would read $^$ as a formula
        garment().save(tmp_path / name)
    assert (
        run("--image", "text.png", *odd, "missing.png")
        == "Visulization.py: error: 2 of 7 pictures could not be explained"
    )
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.err.splitlines()] == ["text.png", "missing.png"]
    *lines, last = (line for line in output.out.splitlines() if not line.startswith("  note: "))
    assert last == "images explained: 5; the pictures are in HeapImg"
    assert [line.split(": ")[0] for line in lines] == [*odd[:2], "a�b.png", "sch�h.png", odd[4]]
    assert all(line.count("%") == 3 for line in lines)
    names = {path.name.split("_as_")[0] for path in (tmp_path / "HeapImg").iterdir()}
    assert names == {"my $^$ shoe ü", "обувь 靴", "a\nb", "schh", "b" * 200}


def test_pictures_of_one_name_from_two_folders_are_both_drawn(run, drawn, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        garment().save(tmp_path / folder / "a.png")
    assert run("--image", "x/a.png", "y/a.png", "--target-class", "Bag", "--save-arrays") == 0
    first, second = drawn
    assert first != second and drawn[second].title.startswith("a.png: predicted ")
    assert any("for Bag" in cell.caption for cell in drawn[first].cells)
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz", allow_pickle=False)
    assert saved["names"].tolist() == ["a.png", "a.png"]
    assert saved["labels"].tolist() == saved["indices"].tolist() == [-1, -1]
    assert saved["target_classes"].tolist() == [8, 8] and saved["maps"].any() and not saved["true_maps"].any()


def test_folders_and_wildcards_are_looked_into_and_each_picture_is_taken_once(run, drawn, monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("b.png", "a.jpg", ".hidden.png"):
        garment().save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").touch()
    (tmp_path / "photos" / "receipt.pdf").touch()  # which Pillow knows, but this project does not read
    assert run("--image", "photos", "photos/b.png", "phot*/*.jpg", "phot*") == 0
    assert sorted(path.split("_as_")[0] for path in drawn) == ["HeapImg/a", "HeapImg/b"]
    (tmp_path / "empty").mkdir()
    assert "there are no pictures in this folder" in run("--image", "empty")
    monkeypatch.setattr(os, "listdir", lambda folder: open(f"{folder}/notes.txt/x"))  # an OSError, also for root
    assert "--image photos: Not a directory; name another folder" in run("--image", "photos")


def test_a_note_says_that_the_model_has_never_seen_the_like(shipped, test_split):
    familiar = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[1]["familiar"]
    upright, noise = test_split[0][0], torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    assert Visulization.doubt(shipped, upright, familiar) == ""
    assert Visulization.doubt(shipped, noise, familiar) == "the model has never seen anything like it"
    turned = upright.rot90(-1, (1, 2))
    familiar["limit"] = familiar["limit"] / 2  # this boot is just below it
    expected = "turned by 90 degrees to the left, it would look more familiar to the model"
    assert Visulization.doubt(shipped, turned, familiar) == expected
    familiar["limit"] *= torch.nan  # after a run on a handful of images
    assert Visulization.doubt(shipped, noise, familiar) == ""


@pytest.fixture
def checkpoint(small_model, tmp_path):
    """Writes a checkpoint of a small model with such a last row of its history."""

    def write(**row):
        (tmp_path / "mine").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / "mine" / "best.pt", small_model, history=[dict(train_accuracy=0.1), row])
        return tmp_path / "mine" / "best.pt"

    return write


def test_every_checkpoint_has_a_folder_of_its_own(run, drawn, checkpoint, tmp_path, monkeypatch):
    checkpoint(train_accuracy=0.9)
    monkeypatch.chdir(tmp_path / "mine")
    run("--index", 0, "--checkpoint", "best.pt")
    assert [path.split("/")[1] for path in drawn] == ["mine_best"]  # and no sheet of a single image
    assert (tmp_path / "mine" / "HeapImg" / "mine_best").is_dir()
    assert {sheet.model_name for sheet in drawn.values()} == {"mine/best.pt"}
    drawn.clear()
    run("--index", 0, 1, "--checkpoint", os.path.relpath(Visulization.SHIPPED_CHECKPOINT))
    assert "HeapImg/contact_sheet.png" in drawn


@pytest.mark.parametrize(
    "row, cutmix, is_noted",
    [
        (dict(val_accuracy=0.69, train_accuracy=0.9), 0.5, True),
        (dict(val_accuracy=0.71, train_accuracy=0.5), 0.0, False),
        (dict(train_accuracy=0.69), 0.0, True),
        (dict(train_accuracy=0.69), 0.5, False),  # of images with two labels
    ],
)
def test_a_model_that_is_barely_trained_gets_a_note(run, drawn, small_model, capsys, tmp_path, row, cutmix, is_noted):
    save_checkpoint(tmp_path / "model.pt", small_model, history=[row], train_config=dict(cutmix=cutmix))
    assert run("--checkpoint", "model.pt", "--index", 0) == 0
    assert ("reached only 69% in training" in capsys.readouterr().out) == is_noted


def test_a_note_is_of_the_epoch_whose_weights_were_kept(run, drawn, small_model, capsys, tmp_path):
    history = [dict(val_accuracy=0.69), dict(val_accuracy=0.9), dict(val_accuracy=0.6)]
    for epoch, is_noted in ((1, True), (2, False)):
        save_checkpoint(tmp_path / "model.pt", small_model, history=history, epoch=epoch)
        assert run("--checkpoint", "model.pt", "--index", 0) == 0
        assert ("reached only 69% in training" in capsys.readouterr().out) == is_noted


def test_a_tilde_is_the_home_folder(run, drawn, checkpoint, tmp_path, monkeypatch):
    checkpoint(val_accuracy=0.9)
    monkeypatch.setenv("HOME", str(tmp_path))
    load, asked = dataset.load, []
    monkeypatch.setattr(dataset, "load", lambda data_dir, train: asked.append(data_dir) or load(data_dir, train))
    assert run("--checkpoint=~/mine/best.pt", "--index", 0, 1, "--data-dir=~/data", "--output-dir=~/out") == 0
    assert asked == [tmp_path / "data"] and str(tmp_path / "out" / "contact_sheet.png") in drawn
    garment().save(tmp_path / "a.png")
    assert run("--image", "~/a.png") == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--target-layer", "blocks.77"], "no layer 'blocks.77'"),
        (["--target-layer", "head"], "not laid out like"),
        (["--target-layer", "blocks"], "does not go through the target layer"),
        (["--output-dir", "file"], "--output-dir file: File exists"),
        (["--only-errors", "--classes", "Trouser"], "no error in these classes"),
        (["--classes", "Hat"], "'Hat' is none of"),
        (["--num-images", "0"], "--num-images 0: give a whole number from 1 to 50"),
        (["--num-images", "many"], "--num-images: invalid int value: 'many'"),
        (["--index", "3", "10000"], "--index [3, 10000]: give a whole number from 0 to 9,999"),
        (["--index", *map(str, range(501))], "--index: give at most 500 images"),
        (["--seed", "-1"], "--seed -1: give"),
        (["--method", "scam"], "--method"),
        (["--average", "--worst", "3"], "not allowed with argument --average"),
        (["--worst", "3", "--target-class", "Shirt"], "--worst has no use for --target-class"),
        (["--average", "--html", "--only-errors"], "--average has no use for --only-errors and --html"),
        (["--compare-layers", "--save-arrays"], "--compare-layers has no use for --save-arrays"),
        (["--image", "a.png", "--data-dir", "x"], "--image has no use for --data-dir"),
        (["--index", "3", "--seed", "1"], "--index has no use for --seed"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    run, drawn, capsys, tmp_path, monkeypatch, few_images, flags, words
):
    (tmp_path / "file").touch()
    trouser = tuple(part[2:3] for part in few_images)
    monkeypatch.setattr(dataset, "load", lambda data_dir, train: trouser)
    status = run(*flags)
    said = status if isinstance(status, str) else capsys.readouterr().err.strip()
    assert status and words in said and "\n" not in said and said.startswith("Visulization.py: error: ") and not drawn


def test_a_model_whose_answer_is_no_number_is_refused(run, drawn, small_model, tmp_path):
    with torch.no_grad():
        small_model.head.bias[3] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", small_model)
    assert "not finite" in run("--checkpoint", "nan.pt", "--index", 0)


def test_a_bug_keeps_its_traceback(run, drawn, monkeypatch):
    def bug(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(Visulization, "make_cell", bug)
    with pytest.raises(ValueError, match="a bug"):
        run("--index", 0, 1)


def test_help_names_every_flag(run, capsys):
    assert run("--help") == 0
    words = capsys.readouterr().out
    flags = "checkpoint image index worst average num-images classes only-errors seed method target-layer target-class "
    flags += "versus compare-layers save-arrays html data-dir output-dir"
    assert all(f"--{flag}" in words for flag in flags.split()) and "(default: 3)" in words


def test_a_missing_libgl_is_explained_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit, match="pip install opencv-python-headless") as stop:
        runpy.run_path(str(ROOT / "Visulization.py"))
    assert "\n" not in stop.value.code
