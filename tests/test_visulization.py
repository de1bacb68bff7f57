"""What is explained, what is drawn of it, and what the command line does."""

import itertools
import os
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL_MODEL
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import dataset
import train
from gradcam import GradCAM
from model import HybridClassifier, ModelConfig, load_checkpoint, save_checkpoint

try:
    import Visulization
except SystemExit as missing:  # OpenCV without libGL.so.1: the message says what to install
    pytest.skip(str(missing), allow_module_level=True)
from common.files import UserError
from explaining.explanation import explain, heatmaps
from explaining.sheets import Cell, paint, save_sheet


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]


@pytest.fixture
def few_images(test_split):
    """What `run` takes for the test split: 499 images of it, and as number 499 an error, 1104."""
    index = [*range(499), 1104]
    return tuple(part[index] for part in test_split)


@pytest.fixture
def run(monkeypatch, few_images, tmp_path):
    """Runs Visulization.py in an empty folder; returns the exit status or the line of an error."""
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


def look_at_cell(axes):
    """The panels of a cell, 336 pixels wide and 12 apart, the label of each, and the caption."""
    row = axes.images[0].get_array()
    panels = [row[:, x : x + 336] for x in range(0, row.shape[1], 348)]
    labels = [""] * len(panels)
    for x, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        labels[int(x // 348)] = text.get_text()
    return SimpleNamespace(
        panels=panels, labels=labels, caption=axes.get_title(), color=axes.title.get_color()
    )


def look_at(figure):
    """What a figure of matplotlib shows: its cells, its words, its colour bar."""
    *all_axes, bar = figure.axes
    (colors,) = bar.findobj(QuadMesh)
    return SimpleNamespace(
        cells=[look_at_cell(axes) for axes in all_axes if axes.images],
        names=[axes.get_ylabel() for axes in all_axes if axes.get_subplotspec().is_first_col()],
        title=figure.get_suptitle(),
        model_name=figure.get_supxlabel(),
        scale=bar.get_ylabel(),
        colors=(colors.get_cmap().name, *bar.get_ylim()),
        color_of_a_quarter=colors.norm(0.25),  # as a part of all colours
    )


@pytest.fixture
def drawn(monkeypatch):
    """What is on each sheet, by its path; the files stay empty, which saves half a second each."""
    found = {}

    def keep(figure, file, **_):
        folder, name = os.path.split(file.name)  # .NAME.PROCESS.part
        found[os.path.join(folder, name[1:].rsplit(".", 2)[0])] = look_at(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


UNSIGNED, SIGNED = ("inferno", 0, 1), ("berlin", -1, 1)
LAYERS = ["stem.stage0_2", "stem.down1"]  # the default of the shipped model


def probabilities(model, images):
    return train.predict(model, images).softmax(dim=1)


def pixels_of(cell):
    """The image that a cell's first panel enlarges."""
    return cell.panels[0][::12, ::12, 0]


# ---- Explanations and their arithmetic ----


def test_an_error_is_explained_for_both_classes(shipped, test_split):
    images, labels = (part[[1104, 0, 3]] for part in test_split)
    cam = GradCAM(shipped, LAYERS, "layercam")
    coat, boot, trouser = explain(cam, images, labels, [1104, 0, 3])
    assert (coat.target, coat.label) == (6, 4)
    assert list(coat.heatmaps) == [6, 4]  # the predicted class first
    assert list(boot.heatmaps) == [9] and list(trouser.heatmaps) == [1]
    # For another class than the predicted and the true one.
    coat, boot, _ = explain(cam, images, labels, [1104, 0, 3], 2)
    assert list(coat.heatmaps) == [2, 4] and list(boot.heatmaps) == [2, 9]
    assert coat.role(2) == "for Pullover" and coat.role(4) == "for Coat (true)"


def test_a_contrast_is_one_signed_map_of_two_classes(shipped, test_split):
    images, labels = (part[[1104, 0, 3]] for part in test_split)
    cam = GradCAM(shipped, LAYERS, "layercam")
    p = probabilities(shipped, images)
    explanations = explain(cam, images, labels, [1104, 0, 3], versus=4)
    maps = cam(dataset.normalize(images), p.argmax(dim=1), 4, normalize=False).numpy()
    for e, target, heatmap in zip(explanations, (6, 9, 1), maps, strict=True):
        assert (e.target, e.versus, list(e.heatmaps)) == (target, 4, [target])
        assert e.heatmaps[target] == pytest.approx(heatmap, rel=1e-4, abs=1e-7)
    # Of a class with itself there is no contrast: it is with the likeliest other class, as for -1.
    for versus in (6, -1):
        (shirt,) = explain(cam, images[:1], labels[:1], [1104], None, versus)
        assert shirt.versus == p[0].argsort(descending=True)[1]


def test_the_numbers_are_the_probabilities_without_the_hottest_tenth_and_a_random_one(
    shipped, test_split
):
    images, labels = (part[[1104, 0]] for part in test_split)
    cam = GradCAM(shipped, "stem.stage1_2", "layercam")
    random = torch.rand(784, generator=torch.Generator().manual_seed(0)).argsort(descending=True)
    for e, image in zip(explain(cam, images, labels, [1104, 0]), images, strict=True):
        for label, heatmap in e.heatmaps.items():
            hottest = torch.from_numpy(heatmap).flatten().argsort(descending=True)
            for places, found in zip((hottest, random), e.masked_probability[label], strict=True):
                masked = image.clone()
                masked.view(-1)[places[:78]] = 0
                expected = probabilities(shipped, masked[None])[0, label].item()
                assert found == pytest.approx(expected, abs=1e-4)
    e.probabilities, e.masked_probability = np.full(10, 0.934), {9: (0.206, 0.881)}
    assert e.masked_words(9) == "0.93, without the hottest tenth 0.21, without a random tenth 0.88"
    e.heatmaps[9] = np.zeros((28, 28))
    assert e.masked_words(9) == ""


def test_of_many_images_each_has_its_own_classes(small_model, test_split):
    images, labels = (part[:502] for part in test_split)
    cam, others = GradCAM(small_model, "stem.stage1_0"), (labels + 1) % 10
    maps = heatmaps(cam, images, labels, others)[500:]
    x = dataset.normalize(images[500:])
    alone = cam(x, labels[500:], others[500:], normalize=False).numpy()
    assert maps == pytest.approx(alone, abs=1e-6)


def test_the_layers_are_all_that_the_image_goes_through(shipped, small_model):
    for model in (shipped, small_model):
        sides, x = {}, torch.zeros(1, 1, 28, 28)
        for name, layer in model.stem.named_children():
            x = layer(x)
            sides[f"stem.{name}"] = x.shape[-1]
        blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
        assert Visulization.all_layers(model) == [*sides, *blocks]
        assert [sides[name] for name in Visulization.default_layers(model)] == [28, 14]


def test_as_many_channels_as_places_are_no_riddle(run, drawn, tmp_path):
    shape = vars(SMALL_MODEL) | dict(stem_dims=(28, 14), embed_dim=7, num_heads=1)
    save_checkpoint(tmp_path / "square.pt", HybridClassifier(ModelConfig(**shape)))
    flags = ("--checkpoint", "square.pt", "--index", 0, "--compare-layers")
    assert run(*flags) == 0 and len(drawn) == 1
    # Nor are they for any model, where the kind of the layer tells.
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.AvgPool2d(3, 1, 1)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16**3, 3)).eval()
    x = torch.rand(2, 1, 16, 16)
    for layer in body:
        told = GradCAM(model, layer, "hirescam", reshape=lambda grid: grid)(x)
        assert told.any() and torch.equal(GradCAM(model, layer, "hirescam")(x), told)


def test_the_heatmap_lies_over_sharp_pixels(test_split):
    image = test_split[0][0, 0].numpy()
    spot = np.zeros((28, 28), np.float32)
    spot[14, 14] = 1
    gray, colored, overlay = paint(image, spot)
    for corner in (0, 11):
        assert np.array_equal(gray[corner::12, corner::12, 0], image)
    changed = np.argwhere((overlay != gray).any(axis=2))  # nothing hot, nothing painted
    assert changed.min() >= 13 * 12 and changed.max() < 16 * 12
    # A quarter of the largest share: its colour with an opacity of 0.9 * sqrt(0.25) = 0.45.
    _, colored, overlay = paint(np.full((28, 28), 100, np.uint8), np.full((28, 28), 0.25))
    color = np.array([87, 16, 110])  # violet, at a quarter of "inferno"
    assert np.abs(colored - color).max() <= 1
    assert np.abs(overlay - (0.55 * 100 + 0.45 * color)).max() < 2
    # No evidence is labelled in words.
    _, colored, overlay = paint(np.full((28, 28), 90, np.uint8), np.zeros((28, 28), np.float32))
    for panel, background in ((colored, [0, 0, 3]), (overlay, [90, 90, 90])):
        assert (panel[:80] == background).all()  # nothing above the words
        rows, columns = np.nonzero((panel == 255).all(axis=2))
        assert 100 < rows.min() and rows.max() < 230
        assert 5 < columns.min() < 40 and 290 < columns.max() < 330


# ---- Pictures ----


def test_a_file_has_its_colours_whatever_a_matplotlibrc_says(tmp_path):
    path = tmp_path / "sheet.png"

    def draw():
        cell = Cell([np.full((336, 336, 3), 90, np.uint8)], "caption", ["label"], "crimson")
        save_sheet([("row", [cell])], "title", "scale", "model", path, is_signed=True)
        return path.read_bytes()

    plain = draw()
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"), int)
    assert min(pixels.shape[:2]) > 400
    # The panel, crimson, and the ends of "berlin".
    for color in ((90, 90, 90), (220, 20, 60), (255, 173, 173), (158, 176, 255)):
        assert np.abs(pixels - color).max(axis=2).min() < 10
    odd = {"font.size": 30, "savefig.dpi": 20, "axes.facecolor": "red", "text.usetex": True}
    with rc_context(odd):
        assert draw() == plain


def test_an_image_per_row_or_per_class(run, drawn, few_images):
    run("--index", 499, 0, 2)  # 499 is image 1104, a coat that is taken for a shirt
    names = ("00000_Ankle-boot_as_Ankle-boot", "00002_Trouser_as_Trouser", "00499_Coat_as_Shirt")
    assert sorted(drawn) == [f"HeapImg/{name}.png" for name in (*names, "contact_sheet")]
    boot, trouser, both, sheet = (drawn[path] for path in sorted(drawn))
    assert both.title == "test image 499: true Coat 13%, predicted Shirt 81%"
    captions = [cell.caption.split(", without")[0] for cell in both.cells]
    assert captions == ["for Shirt (predicted): 0.81", "for Coat (true): 0.13"]
    assert [cell.labels[0] for cell in both.cells] == ["input", ""]
    assert boot.cells[0].caption.startswith("for Ankle boot (predicted and true): ")
    assert boot.title.startswith("test image 0: true Ankle boot, predicted")
    assert boot.model_name == "shipped/model.pt" and len(boot.cells) == 1
    assert sheet.title.startswith("layercam of stem.stage0_2 + stem.down1: test images")
    assert sheet.names == ["Trouser", "Coat", "Ankle boot"]
    plain = [""] * 3
    labels = [plain, ["", "for Shirt", "for Coat"], plain]
    assert [cell.labels for cell in sheet.cells] == labels
    assert [cell.color for cell in sheet.cells] == ["black", "crimson", "black"]
    for one in drawn.values():
        assert one.colors == UNSIGNED and one.color_of_a_quarter == 0.25
        assert one.scale == "share of the evidence (1 = largest)"
    # The sheet has the same panels as each image's own picture; of an error, both overlays.
    first, second = (cell.panels for cell in both.cells)
    own = (trouser.cells[0].panels, [first[0], first[2], second[2]], boot.cells[0].panels)
    for cell, panels, i in zip(sheet.cells, own, (2, 499, 0), strict=True):
        assert np.array_equal(cell.panels, panels)
        assert np.array_equal(pixels_of(cell), few_images[0][i, 0])


def test_what_is_given_twice_is_drawn_once_in_the_order_given(run, drawn, tmp_path):
    flags = ("--target-layer", "blocks.0", "blocks.0", "--save-arrays", "--html")
    assert run("--index", 5, 3, "--index", 5, *flags) == 0
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert saved["indices"].tolist() == [5, 3] and saved["target_layers"].tolist() == ["blocks.0"]
    assert (tmp_path / "HeapImg" / "index.html").read_text().count("<figure ") == 2
    drawn.clear()
    assert run("--classes", "Bag", 0, "bag") == 0
    sheet = drawn["HeapImg/contact_sheet.png"]
    assert sheet.names == ["Bag", "T-shirt/top"] and len(sheet.cells) == 6  # three of each
    assert any("_T-shirt-top_as_" in path for path in drawn)


def test_images_are_chosen_by_class_seed_and_result(run, drawn, few_images):
    def chosen(*flags):
        drawn.clear()
        assert run("--num-images", 2, "--classes", "Coat", "6", *flags) == 0
        del drawn["HeapImg/contact_sheet.png"]
        return sorted(path[len("HeapImg/") : -len(".png")].split("_") for path in drawn)

    first = chosen()
    assert chosen() == first != chosen("--seed", 1)
    flags = ("--only-errors", "--target-class", "shirt", "--target-layer", "blocks.0")
    for seed in (0, 1):
        found = chosen(*flags, "--seed", seed)
        assert sorted(true for _, true, *_ in found) == ["Coat", "Coat", "Shirt", "Shirt"]
        for i, true, _, predicted, *_ in found:
            assert predicted != true == dataset.CLASS_NAMES[few_images[1][int(i)]]


def test_the_worst_errors_come_first(run, drawn, shipped, few_images, capsys):
    run("--worst", 5, "--classes", "Shirt")
    (sheet,) = drawn.values()
    images, labels = few_images
    p = probabilities(shipped, images)
    wrong = [i for i in (labels == 6).nonzero().flatten().tolist() if p[i].argmax() != 6]
    worst = sorted(wrong, key=lambda i: -p[i].max().item())[:5]
    assert f"errors in these classes: {len(wrong)}\n" in capsys.readouterr().out
    assert "5 most confident" in sheet.title
    for i, cell in zip(worst, sheet.cells, strict=True):
        answer, share = dataset.CLASS_NAMES[p[i].argmax()], f"{p[i].max():.0%}"
        assert cell.caption == f"{i}: true Shirt {p[i, 6]:.0%},\npredicted {answer} {share}"
        assert cell.labels == ["", f"for {answer}", "for Shirt"] and cell.color == "crimson"
        assert np.array_equal(pixels_of(cell), images[i, 0])


def test_each_class_has_its_mean_map_on_its_mean_image(run, drawn, shipped, few_images, tmp_path):
    run("--average", "--classes", "Shirt", "Coat", "--save-arrays")
    (sheet,) = drawn.values()
    images, labels = few_images
    predictions = train.predict(shipped, images).argmax(dim=1)
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert saved["labels"].tolist() == [x for x in labels.tolist() if x in (4, 6)]
    assert np.array_equal(saved["labels"], saved["target_classes"])
    means = [saved["maps"][saved["labels"] == k].mean(axis=0) for k in (6, 4)]
    for k, mean, cell in zip((6, 4), means, sheet.cells, strict=True):
        right = (predictions[labels == k] == k).float().mean()
        count = f"{(labels == k).sum()} images, {right:.0%} right"
        assert cell.caption == f"{dataset.CLASS_NAMES[k]}: {count}"
        mean_image = images[labels == k, 0].float().mean(dim=0)
        assert np.abs(pixels_of(cell) - mean_image.numpy()).max() <= 0.51
        expected = paint(np.zeros((28, 28), np.uint8), mean / np.max(means))[1]
        assert np.abs(cell.panels[1].astype(int) - expected).max() <= 3
    assert sheet.scale == "mean share of the evidence (1 = largest of all)"
    assert sheet.colors == UNSIGNED


def test_one_image_is_seen_from_every_layer(run, drawn, shipped, few_images):
    run("--index", 499, "--compare-layers", "--method", "gradcam")
    (sheet,) = drawn.values()
    first, *others = [cell.caption for cell in sheet.cells]
    assert first == "stem.stage0_2 + stem.down1" and len(others) == 11
    assert (others[0], others[-1]) == ("stem.first", "blocks.0")
    assert "gradcam for Shirt (predicted)" in sheet.title and sheet.colors == UNSIGNED
    assert sheet.scale.endswith("in any layer, square root scale")
    assert sheet.color_of_a_quarter == 0.5  # its square root
    x, maps = dataset.normalize(few_images[0][499:]), []
    for layer in (LAYERS, *others):
        maps.append(GradCAM(shipped, layer, "gradcam")(x, 6, normalize=False)[0].numpy())
    for cell, heatmap in zip(sheet.cells, maps, strict=True):
        _, *expected = paint(few_images[0][499, 0].numpy(), (heatmap / np.max(maps)) ** 0.5)
        assert np.abs(np.int64(cell.panels) - expected).max() <= 3


def test_a_contrast_is_drawn_with_two_colours_and_named(run, drawn, tmp_path):
    run("--index", 499, 0, "--versus", "coat", "--save-arrays")
    sheet = drawn["HeapImg/contact_sheet.png"]
    assert sheet.scale == "evidence for the class (1), for the other (-1)"
    roles = ["for Shirt, not Coat", "for Ankle boot, not Coat"]
    assert [cell.labels for cell in sheet.cells] == [["", role, ""] for role in roles]
    own = drawn["HeapImg/00499_Coat_as_Shirt_not_Coat.png"]
    assert own.scale == sheet.scale and len(own.cells) == 1
    assert own.cells[0].caption.startswith("for Shirt, not Coat: 0.81, without")
    run("--worst", 1, "--classes", "Coat", "--versus", "next")
    worst = drawn["HeapImg/worst.png"]
    assert worst.cells[0].labels == ["", "for Shirt, not Coat", ""] and worst.colors == SIGNED
    run("--index", 499, "--compare-layers", "--versus", "Coat")
    layers = drawn["HeapImg/00499_Coat_layers.png"]
    assert layers.scale == f"{sheet.scale}, in any layer, square root scale"
    assert layers.color_of_a_quarter == 0.75  # half way from 0 to 1
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    heatmap = saved["maps"][0]
    assert saved["versus"].tolist() == [4, 4]
    assert not saved["true_maps"].any()  # of image 0, an Ankle boot, the map is a contrast, too
    for one, panel in ((sheet, 1), (own, 1), (layers, 0)):
        pixels = one.cells[0].panels[panel][6::12, 6::12].reshape(-1, 3).astype(int)
        red, blue = pixels[heatmap.argmax()], pixels[heatmap.argmin()]
        assert one.colors == SIGNED and red[0] > red[2] + 30 and blue[2] > blue[0] + 100


def test_a_class_that_is_asked_for_is_in_the_files_name(run, drawn):
    run("--index", 0, 499, "--target-class", "Coat")
    colors = [cell.color for cell in drawn.pop("HeapImg/contact_sheet.png").cells]
    assert colors == ["crimson", "black"]  # of the answers
    run("--index", 0, "--target-class", "Ankle boot")
    run("--index", 0, "--target-class", "Coat", "--versus", "Bag")
    names = ["Ankle-boot_for_Coat", "Shirt_for_Coat", "Ankle-boot", "Coat_not_Bag"]
    assert [path.split("_as_")[1] for path in drawn] == [f"{name}.png" for name in names]


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-images", 3],
        ["--worst", 24],
        pytest.param(["--average"], marks=pytest.mark.slow),
        ["--index", 0, "--compare-layers"],
    ],
)
def test_words_are_legible_in_the_readme(run, monkeypatch, flags):
    figures = []
    monkeypatch.setattr(Visulization, "save_overlay", lambda *_: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert run(*flags) == 0
    (figure,) = figures
    renderer, bounds = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) > 10 and "shipped/model.pt" in [text.get_text() for text in texts]
    smallest = min(text.get_fontsize() for text in texts) / 72  # inches
    assert smallest / figure.get_size_inches()[0] * 830 >= 10  # pixels, in a page of 830
    captions = [axes.title for axes in figure.axes if axes.title.get_text()]
    captions += [figure._suptitle, figure._supxlabel]
    boxes = [text.get_window_extent(renderer) for text in captions]
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_arrays_hold_what_the_pictures_show(run, drawn, shipped, few_images, tmp_path):
    index = [499, 0, 3]
    run("--index", *index, "--save-arrays", "--output-dir", "here")
    images, labels = (part[index] for part in few_images)
    saved = np.load(tmp_path / "here" / "heatmaps.npz")
    p = probabilities(shipped, images)
    answers = p.argmax(dim=1)
    expected = dict(
        names=["test image 499", "test image 0", "test image 3"],
        indices=index,
        images=images[:, 0].tolist(),
        labels=labels.tolist(),
        predictions=answers.tolist(),
        target_classes=answers.tolist(),
        versus=[-1] * 3,
        target_layers=LAYERS,
        method="layercam",
        class_names=list(dataset.CLASS_NAMES),
    )
    assert {name: saved[name].tolist() for name in expected} == expected
    assert saved["probabilities"] == pytest.approx(p.numpy(), abs=1e-5)
    cam, x = GradCAM(shipped, LAYERS, "layercam"), dataset.normalize(images)
    for name, targets in (("maps", answers), ("true_maps", labels)):
        maps = cam(x, targets, normalize=False)
        assert saved[name] == pytest.approx(maps.numpy(), rel=1e-3, abs=1e-6)


# ---- One's own pictures and checkpoints ----


def save_garment(path):
    """A trouser-like thing on white."""
    pixels = np.full((90, 60), 255, np.uint8)
    pixels[5:85, 10:50], pixels[30:85, 27:33] = 60, 255
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.filterwarnings("ignore:Glyph")  # pytest shows what the script leaves unsaid
def test_one_bad_file_does_not_stop_the_others(run, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    odd = ["my $^$ shoe ü.png", "обувь 靴.png", "a\x1bb.png", os.fsdecode(b"sch\xfch.png")]
    odd.append("b" * 251 + ".png")
    for name in odd:  # matplotlib would read $^$ as a formula
        save_garment(tmp_path / name)
    status = run("--image", "text.png", *odd, "missing.png")
    assert status == "Visulization.py: error: 2 of 7 pictures could not be explained"
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.err.splitlines()] == ["text.png", "missing.png"]
    *lines, last = (line for line in output.out.splitlines() if not line.startswith("  note: "))
    assert last == "images explained: 5; the pictures are in HeapImg"
    assert [line.split(": ")[0] for line in lines] == [*odd[:2], "a�b.png", "sch�h.png", odd[4]]
    assert all(line.count("%") == 3 for line in lines)
    names = {path.name.split("_as_")[0] for path in (tmp_path / "HeapImg").iterdir()}
    assert names == {"my $^$ shoe ü", "обувь 靴", "a\x1bb", "schh", "b" * 200}


def test_folders_are_looked_into_and_each_picture_is_taken_once(run, drawn, tmp_path):
    for name in ("x/b.png", "x/a.jpg", "x/.hidden.png", "y/a.png"):
        save_garment(tmp_path / name)
    for name in ("notes.txt", "receipt.pdf"):  # Pillow knows PDF, but this project does not read it
        (tmp_path / "x" / name).touch()
    (tmp_path / "link.png").symlink_to("x/a.jpg")
    given = ("link.png", "x", "x/b.png", tmp_path / "x/b.png", "x/../x/b.png", "y/a.png")
    assert run("--image", *given, "--target-class", "Bag", "--save-arrays") == 0
    paths = [path.split("_as_")[0] for path in drawn]
    assert paths == ["HeapImg/a", "HeapImg/b", "HeapImg/a_2"]  # two of one name, from two folders
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert saved["names"].tolist() == ["a.jpg", "b.png", "a.png"]
    assert saved["labels"].tolist() == saved["indices"].tolist() == [-1] * 3
    assert saved["target_classes"].tolist() == [8] * 3
    assert saved["maps"].any() and not saved["true_maps"].any()
    (tmp_path / "empty").mkdir()
    assert "there are no pictures in this folder" in run("--image", "empty")


def test_the_likeliest_classes_are_printed_with_the_doubts(
    run, drawn, shipped, monkeypatch, capsys, test_split
):
    image = test_split[0][8].rot90(2, (1, 2))  # a sandal, upside down
    red = np.full((50, 100, 3), (200, 30, 30), np.uint8)
    picture = image[0].numpy(), red, "a reason"
    monkeypatch.setattr(Visulization, "read_image", lambda path: picture)
    assert run("--image", "x.png", "--versus", "Trouser") == 0
    p = probabilities(shipped, image[None])[0].tolist()
    best = sorted(zip(p, dataset.CLASS_NAMES, strict=True), reverse=True)[:3]
    answer, *notes, _ = capsys.readouterr().out.splitlines()
    assert answer == "x.png: " + ", ".join(f"{name} {share:.1%}" for share, name in best)
    familiar = "rotated by 180 degrees, it would look more familiar to the model"
    assert notes == ["  note: a reason", f"  note: {familiar}"]
    (sheet,) = drawn.values()
    (cell,) = sheet.cells
    assert cell.labels == ["photograph", "input", "heatmap", "overlay"]
    assert cell.caption.startswith(f"for {best[0][1]}, not Trouser: ")
    assert (cell.panels[0][90:250] == (200, 30, 30)).all()
    assert np.array_equal(cell.panels[1][::12, ::12, 0], image[0])


def test_without_the_data_set_only_familiarity_is_not_told(
    run, drawn, small_model, monkeypatch, capsys, tmp_path
):
    def load(data_dir, train):
        raise UserError(f"no data in {data_dir}")

    save_garment(tmp_path / "x.png")
    save_checkpoint(tmp_path / "mine.pt", small_model)
    flags = ("--checkpoint", "mine.pt", "--image", "x.png", "--data-dir", "there")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load", load)
        assert run(*flags) == 0 and len(drawn) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and line.endswith("is not told: no data in there")
    assert run(*flags) == 0 and (tmp_path / "mine.features.pt").exists()


def test_a_file_cannot_command_the_terminal(run, drawn, small_model, monkeypatch, capsys, tmp_path):
    def read(path):
        raise UserError("cannot be read (\x1b[1J)")

    save_garment(tmp_path / "\x1b[2J.png")
    save_checkpoint(tmp_path / "\x1b[3J.pt", small_model, history=[dict(epoch=1, val_accuracy=0.1)])
    flags = ("--checkpoint", "\x1b[3J.pt", "--image", "\x1b[2J.png")
    run(*flags)
    monkeypatch.setattr(Visulization, "read_image", read)
    run(*flags)
    (sheet,) = drawn.values()
    output, errors = capsys.readouterr()
    words = [*output.splitlines(), *errors.splitlines(), sheet.title, sheet.model_name]
    found = ["".join(re.findall(r"�\[(.)J", text)) for text in words]
    assert found == ["3", "2", "3", "3", "21", "2", "3"]
    assert all(text.isprintable() for text in words)


@pytest.mark.parametrize("accuracy", [0.69, 0.71])
def test_a_checkpoint_has_a_folder_and_a_barely_trained_one_a_note(
    run, drawn, small_model, tmp_path, monkeypatch, capsys, accuracy
):
    history = [
        dict(epoch=1, train_accuracy=0.1),
        dict(epoch=2, train_accuracy=0.9, val_accuracy=accuracy),
        dict(epoch=3, val_accuracy=0.2),
    ]
    save_checkpoint(tmp_path / "mine" / "best.pt", small_model, history=history)
    monkeypatch.chdir(tmp_path / "mine")
    assert run("--index", 0, "--checkpoint", "best.pt") == 0
    said = capsys.readouterr().out
    assert ("mine/best.pt reached only 69% in training" in said) == (accuracy == 0.69)
    assert [path.split("/")[1] for path in drawn] == ["mine_best"]  # and no sheet of a single image
    run("--index", 0, 1, "--checkpoint", os.path.relpath(Visulization.SHIPPED_CHECKPOINT))
    assert "HeapImg/contact_sheet.png" in drawn
    # A tilde is the home folder.
    monkeypatch.setenv("HOME", str(tmp_path))
    load, asked = dataset.load, []
    monkeypatch.setattr(dataset, "load", lambda folder, train: asked.append(folder) or load("", 0))
    flags = ("--checkpoint=~/mine/best.pt", "--data-dir=~/data", "--output-dir=~/out")
    assert run(*flags, "--index", 0, 1) == 0 and asked == [tmp_path / "data"]
    assert str(tmp_path / "out" / "contact_sheet.png") in drawn


# ---- What is refused ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--target-layer", "blocks.77"], "no layer 'blocks.77'"),
        (["--output-dir", "file"], "cannot write file/00000_Trouser_as_Trouser.png: File exists"),
        (["--only-errors", "--classes", "Trouser"], "no error in these classes"),
        (["--classes", "Hat"], "'Hat' is none of"),
        (["--num-images", "0"], "--num-images 0: give a whole number from 1 to 50"),
        (["--index", "3", "10000"], "--index [3, 10000]: give a whole number from 0 to 9,999"),
        (["--index", *map(str, range(501))], "--index: give at most 500 images"),
        (["--average", "--worst", "3"], "not allowed with argument --average"),
        (["--checkpoint", "nan.pt", "--index", "0"], "not finite"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run, drawn, small_model, capsys, tmp_path, monkeypatch, few_images, flags, words
):
    (tmp_path / "file").touch()
    torch.nn.init.constant_(small_model.head.bias, float("nan"))
    save_checkpoint(tmp_path / "nan.pt", small_model)
    trouser = tuple(part[2:3] for part in few_images)
    monkeypatch.setattr(dataset, "load", lambda data_dir, train: trouser)
    status = run(*flags)
    said = status if isinstance(status, str) else capsys.readouterr().err.strip()
    assert status and words in said and "\n" not in said and not drawn
    assert said.startswith("Visulization.py: error: ")


CHOICE = "--num-images 3 --only-errors --seed 0"


@pytest.mark.parametrize(
    "given, useless",
    [
        ("--image a.png", f"--classes 1 {CHOICE}"),
        ("--index 3", f"--classes 1 {CHOICE}"),
        ("--worst 3", f"--target-class 1 --compare-layers {CHOICE}"),
        ("--average", f"--target-class 1 --versus 1 --compare-layers {CHOICE} --html"),
    ],
)
def test_a_useless_flag_is_refused_even_with_its_default(run, capsys, given, useless):
    assert run(*given.split(), *useless.split()) == 2
    flags = " and ".join(word for word in useless.split() if word.startswith("--"))
    words = f"error: {given.split()[0]} has no use for {flags}: leave it out\n"
    assert words in capsys.readouterr().err
    assert run("--help") == 0 and given.split()[0] in capsys.readouterr().out


def test_a_missing_libgl_is_explained_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit, match="pip install opencv-python-headless") as stop:
        runpy.run_path(str(ROOT / "Visulization.py"))
    assert "\n" not in stop.value.code
