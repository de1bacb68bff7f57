"""What is explained, what is drawn of it, and what the command line does."""

import itertools
import os
import re
import runpy
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_MODEL
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import dataset
from dataset import CLASS_NAMES
from gradcam import GradCAM
from model import HybridClassifier, ModelConfig, save_checkpoint

try:
    import Visulization
except SystemExit as missing:  # OpenCV without libGL.so.1: the message says what to install
    pytest.skip(str(missing), allow_module_level=True)
from explaining import explanation, features, sheets
from explaining.explanation import UNSURE, Evidence, Explanation, explain, mask_evidence
from explaining.sheets import CONTRAST, SHARES, Cell, Sheet, paint, save_sheet

LAYERS = ["stem.stage0_0", "stem.down1"]  # the default of the shipped model


@pytest.fixture
def few_images(test_split):
    """499 test images, and as number 499 the error 1104."""
    index = [*range(499), 1104]
    return tuple(part[index] for part in test_split)


@pytest.fixture
def use(monkeypatch):
    """Makes images and labels the whole data set, for training and test."""
    return lambda *data: monkeypatch.setattr(dataset, "load", lambda *_, **__: data)


@pytest.fixture
def run(script, monkeypatch, use, few_images):
    """Runs Visulization.py on `few_images`."""
    use(*few_images)
    monkeypatch.setattr(Visulization, "set_threads", lambda: None)
    return partial(script, Visulization)


@pytest.fixture
def drawn(monkeypatch):
    """The sheet, scale and source of each picture, by its path; no file is written."""
    found = {}

    def keep(folder, sheet, scale, source):
        found[str(folder / sheet.file_name)] = (sheet, scale, source)

    monkeypatch.setattr(Visulization, "save_sheet", keep)
    return found


def probabilities(model, images):
    with torch.no_grad():
        return model(dataset.normalize(images)).softmax(dim=1)


def is_painted(panel, heatmap, scale):
    """Whether a panel shows a heatmap, up to rounding."""
    (expected,) = paint(np.zeros((28, 28), np.uint8), heatmap, scale)[1]
    return np.abs(panel[0].astype(int) - expected).max() <= 2


@pytest.fixture
def cam(shipped):
    return GradCAM(shipped, LAYERS, "hirescam", log_odds=True)


@pytest.fixture
def three_images(test_split):
    """A coat that is taken for a shirt, an ankle boot and a trouser."""
    return [part[[1104, 0, 3]] for part in test_split]


# ---- Explanations ----


def test_an_error_is_explained_for_both_classes(cam, three_images):
    for target, expected in ((None, [[6, 4], [9], [1]]), (2, [[2, 4], [2, 9], [2, 1]])):
        found = explain(cam, *three_images, target)
        assert [[evidence.label for evidence in e.evidence] for e in found] == expected


def test_a_contrast_is_one_signed_map_of_two_classes(cam, shipped, three_images):
    images, labels = three_images
    p = probabilities(shipped, images)
    explanations = explain(cam, images, labels, versus=4)
    maps = cam(dataset.normalize(images), p.argmax(dim=1), 4, normalize=False).numpy()
    for e, target, heatmap in zip(explanations, (6, 9, 1), maps, strict=True):
        (evidence,) = e.evidence
        assert (evidence.label, evidence.versus) == (target, 4)
        assert evidence.heatmap == pytest.approx(heatmap, rel=1e-4, abs=1e-7)
    # Of a class with itself there is no contrast: it is with the likeliest other class.
    for versus in (6, "next"):
        (shirt,) = explain(cam, images[:1], labels[:1], None, versus)
        assert shirt.evidence[0].versus == p[0].argsort(descending=True)[1]


@pytest.mark.parametrize("versus", [None, "next"])
def test_a_tenth_of_the_garment_is_black_the_hottest_or_a_random_one(
    cam, shipped, three_images, versus
):
    images, labels = three_images
    images[2], images[2, 0, 4:6, 3:9] = 0, 200  # twelve pixels: one is black
    explanations = explain(cam, images, labels, None, versus)
    mask_evidence(shipped, explanations)
    draws = torch.rand(20, 784, generator=torch.Generator().manual_seed(0)).numpy()
    for e, image in zip(explanations, images, strict=True):
        garment = image.flatten().nonzero().flatten().numpy()
        for evidence in e.evidence:
            masked = image.repeat(22, 1, 1).flatten(1)
            for row, values in zip(masked[1:], [evidence.heatmap.ravel(), *draws], strict=True):
                row[garment[np.argsort(-values[garment])][: round(len(garment) / 10)]] = 0
            p = probabilities(shipped, masked.view(22, 1, 28, 28))[:, evidence.label].numpy()
            expected = (p[0], p[1], p[2:].mean(), p[2:].std(ddof=1))
            assert evidence.probabilities == pytest.approx(expected, abs=1e-4)
        assert torch.equal(torch.from_numpy(e.image), image[0])


def test_evidence_in_words():
    some, none = np.eye(28, dtype=np.float32), np.zeros((28, 28), np.float32)
    e = Explanation(np.uint8(some), 9, np.eye(10)[9], [])
    words = "0.93; without its hottest tenth {}, without a random tenth of the garment 0.85 ± 0.02"
    for hottest, verdict in ((0.82, "something"), (0.84, "little")):
        caption = e.caption(Evidence(9, -1, some, (0.934, hottest, 0.851, 0.02)))
        assert caption == f"for Ankle boot (says {verdict}):\n{words.format(hottest)}"
    evidence = Evidence(6, 4, none, (0.9, 0.2, 0.8, 0.1))
    assert e.caption(evidence) == "no evidence\nfor Shirt, not Coat"
    assert evidence.verdict() == "says little"


def test_the_layers_are_all_that_the_image_goes_through(shipped):
    shape = vars(SMALL_MODEL) | dict(stem_dims=(28, 14), embed_dim=7, num_heads=1)
    model = HybridClassifier(ModelConfig(**shape)).eval()
    # As many channels as places are no riddle.
    Visulization.make_cam(model, ["stem.first"], "layercam")
    stem = [f"stem.{name}" for name in ("first", "down1", "stage1_0", "down2", "stage2_0")]
    assert Visulization.all_layers(model) == [*stem, "blocks.0", "blocks.1"]
    assert Visulization.default_layers(model) == ["stem.down2"]  # it has no block at 28x28
    assert Visulization.default_layers(shipped) == LAYERS


# ---- Pictures ----


@pytest.mark.parametrize(
    "scale, amount, color, opaque",
    [
        # A quarter of the largest share: the colour at a quarter of "inferno", and an opacity of
        # 0.9 * sqrt(0.25). In a contrast: the end's colour at 0.9 * 0.25; a quarter of it on white.
        (SHARES, 0.25, (87, 16, 110, 115), (87, 16, 110)),
        (CONTRAST, -0.25, (0, 112, 255, 57), (191, 219, 255)),
        (CONTRAST, 0.25, (232, 0, 42, 57), (249, 191, 201)),
    ],
)
def test_the_hotter_the_more_opaque(scale, amount, color, opaque):
    image, heatmap = np.full((28, 28), 100, np.uint8), np.zeros((28, 28), np.float32)
    heatmap[3, 5] = amount
    (gray,), (colored,), (below, above) = paint(image, heatmap, scale)
    assert np.array_equal(gray, image) and np.array_equal(below, image)
    assert np.abs(above[3, 5].astype(int) - color).max() <= 1 and above[4, 5, 3] == 0
    assert np.abs(colored[3, 5].astype(int) - opaque).max() <= 2


def test_a_file_has_its_colours_whatever_a_matplotlibrc_says(tmp_path):
    def draw():
        cell = Cell([[np.full((28, 28), 90, np.uint8)]], "caption", ["label"], "crimson")
        save_sheet(tmp_path, Sheet("sheet.png", "title", [cell], 1), CONTRAST, "source")
        return (tmp_path / "sheet.png").read_bytes()

    plain = draw()
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.array(picture.convert("RGB"), int)
    # The panel, crimson, and the ends of the scale.
    for color in ((90, 90, 90), (220, 20, 60), (232, 0, 42), (0, 112, 255)):
        assert np.abs(pixels - color).max(axis=2).min() < 10
    odd = {"font.size": 30, "savefig.dpi": 20, "text.usetex": True}
    with rc_context(odd):
        assert draw() == plain


def test_a_picture_of_each_image_and_a_sheet_of_all(run, drawn, few_images):
    run("--index", 499, 0, 2)  # 499 is image 1104, a coat that is taken for a shirt
    names = ("00000_Ankle-boot_as_Ankle-boot", "00002_Trouser_as_Trouser", "00499_Coat_as_Shirt")
    assert sorted(drawn) == [f"HeapImg/{name}.png" for name in (*names, "contact_sheet")]
    boot, trouser, both, contact = (drawn[path][0] for path in sorted(drawn))
    assert both.title == "test image 499: true Coat 13%, predicted Shirt 81%"
    captions = [re.sub(r" \(.*\n|;.*", "", cell.caption) for cell in both.cells]
    assert captions == ["for Shirt0.81", "for Coat0.13"]
    assert boot.title == "test image 0: true Ankle boot, predicted Ankle boot 99%"
    assert contact.cells[0].caption == "499: true Coat 13%,\npredicted Shirt 81%"
    assert [cell.color for cell in contact.cells] == ["crimson", "black", "black"]
    assert contact.cells[0].labels == ["", "for Shirt", "for Coat"]
    start = "HiResCAM of log-odds, mean of 2 layers\n(stem.stage0_0 + stem.down1"
    for _, scale, source in drawn.values():
        assert scale == SHARES and source.startswith(start)
    first, second = (cell.panels for cell in both.cells)
    own = ([first[0], first[2], second[2]], boot.cells[0].panels, trouser.cells[0].panels)
    for cell, panels, i in zip(contact.cells, own, (499, 0, 2), strict=True):
        assert np.array_equal(panels[0][0], few_images[0][i, 0])
        for found, expected in zip(cell.panels, panels, strict=True):
            assert all(map(np.array_equal, found, expected))
    hottest = [cell.panels[2][1][..., 3].max() for cell in both.cells]
    assert max(hottest) == 230 and min(hottest) < 229  # both on one scale


def test_the_first_images_of_a_class_are_drawn(run, drawn, few_images):
    assert run("--num-images", 2, "--classes", "shirt", "4") == 0
    *paths, _ = drawn
    labels = few_images[1]
    numbers = [i for label in (6, 4) for i in (labels == label).nonzero()[:2, 0].tolist()]
    assert [int(path.split("/")[1][:5]) for path in paths] == numbers


def test_the_worst_errors_come_first(run, drawn, shipped, few_images):
    run("--worst", 5, "--classes", "Shirt")
    ((sheet, _, _),) = drawn.values()
    images, labels = few_images
    p = probabilities(shipped, images)
    wrong = [i for i in (labels == 6).nonzero().flatten().tolist() if p[i].argmax() != 6]
    worst = sorted(wrong, key=lambda i: -p[i].max().item())[:5]
    assert sheet.file_name == "worst.png"
    assert [int(cell.caption.split(":")[0]) for cell in sheet.cells] == worst


def test_each_class_has_its_mean_map_on_its_mean_image(run, drawn, few_images, tmp_path):
    assert run("--average", "--classes", "Shirt", "Coat", "--save-arrays") == 0
    ((sheet, scale, _),) = drawn.values()
    images, labels = few_images
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert np.array_equal(saved["labels"], saved["target_classes"]) and scale == SHARES
    for k, cell in zip((4, 6), sheet.cells, strict=True):
        assert cell.caption == f"{CLASS_NAMES[k]}: {(labels == k).sum()} images"
        mean_image = images[labels == k, 0].float().mean(dim=0)
        assert np.abs(cell.panels[0][0] - mean_image.numpy()).max() <= 0.51
        mean = saved["maps"][saved["labels"] == k].mean(axis=0)
        assert is_painted(cell.panels[1], mean / mean.max(), SHARES)


def test_one_image_is_seen_from_every_layer(run, drawn, shipped, few_images):
    run("--index", 499, "--compare-layers", "--method", "gradcam", "--versus", "Coat")
    ((sheet, scale, _),) = drawn.values()
    first, *others = [cell.caption for cell in sheet.cells]
    assert first == "stem.stage0_0 + stem.down1"
    assert others == Visulization.all_layers(shipped)
    assert "for Shirt, not Coat, each" in sheet.title and scale == CONTRAST
    image, x = few_images[0][499, 0].numpy(), dataset.normalize(few_images[0][499:])
    for layer, cell in zip([LAYERS, *others], sheet.cells, strict=True):
        heatmap = GradCAM(shipped, layer, "gradcam")(x, 6, 4)[0].numpy()
        assert is_painted(cell.panels[0], heatmap, scale)
        assert np.array_equal(cell.panels[1][0], image)


def test_one_image_is_explained_for_every_class(run, drawn, cam, shipped, few_images, capsys):
    run("--index", 499, "--all-classes")
    wrote = "wrote HeapImg/00499_Coat_classes.png (model: record)\n"
    assert capsys.readouterr().out == wrote
    ((sheet, _, _),) = drawn.values()
    images = few_images[0][[499] * 10]
    p = probabilities(shipped, images)[0]
    maps = cam(dataset.normalize(images), torch.arange(10), normalize=False).numpy()
    for cell, name, share, heatmap in zip(sheet.cells, CLASS_NAMES, p, maps, strict=True):
        assert cell.caption == f"{name} {share:.0%}"
        assert is_painted(cell.panels[0], heatmap / maps.max(), SHARES)


def test_what_is_asked_for_is_in_the_files_name(run, drawn, tmp_path):
    run("--index", 499, 0, "--versus", "coat", "--save-arrays")
    sheet, scale, _ = drawn.pop("HeapImg/contact_sheet.png")
    roles = [["", "for Shirt, not Coat"], ["", "for Ankle boot, not Coat"]]
    assert [cell.labels for cell in sheet.cells] == roles and scale == CONTRAST
    saved = np.load(tmp_path / "HeapImg" / "heatmaps.npz")
    assert saved["versus"].tolist() == [4, 4] and saved["maps"].min() < 0
    assert saved["target_classes"].tolist() == [6, 9]
    run("--index", 0, "--target-class", "Coat")
    run("--index", 0, "--target-class", "Coat", "--versus", "next")
    names = ["Shirt_not_Coat", "Ankle-boot_not_Coat", "Ankle-boot_for_Coat"]
    names.append("Ankle-boot_for_Coat_not_Ankle-boot")
    assert [path.split("_as_")[1] for path in drawn] == [f"{name}.png" for name in names]


@pytest.mark.parametrize("flags", [["--num-images", 1], ["--index", 0, 1, "--versus", "Coat"]])
def test_words_are_legible_in_the_readme(run, monkeypatch, flags):
    figures = []
    monkeypatch.setattr(sheets.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert run(*flags) == 0
    figure = figures[-1]
    renderer, bounds = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    smallest = min(text.get_fontsize() for text in texts) / 72  # inches
    assert smallest / figure.get_size_inches()[0] * 830 >= 10  # pixels, in a page of 830
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) > 5
    assert all(bounds.x0 <= box.x0 and box.x1 <= bounds.x1 for box in boxes)
    assert all(bounds.y0 <= box.y0 and box.y1 <= bounds.y1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_arrays_hold_what_the_pictures_show(run, drawn, cam, shipped, few_images, tmp_path):
    index = [499, 0, 3]
    run("--index", 499, 0, "--index", 3, "--save-arrays", "--output-dir=~/here")
    images, labels = (part[index] for part in few_images)
    saved = np.load(tmp_path / "here" / "heatmaps.npz")
    expected = dict(
        names=["test image 499", "test image 0", "test image 3"],
        indices=index,
        images=images[:, 0].tolist(),
        labels=labels.tolist(),
        predictions=[6, 9, 1],
        versus=[-1] * 3,
        target_layers=LAYERS,
        method="hirescam",
        class_names=list(CLASS_NAMES),
    )
    assert {name: saved[name].tolist() for name in expected} == expected
    assert saved["probabilities"] == pytest.approx(probabilities(shipped, images), abs=1e-5)
    maps = cam(dataset.normalize(images), normalize=False)
    assert saved["maps"] == pytest.approx(maps.numpy(), rel=1e-3, abs=1e-6)
    words = [*drawn.values()][1][0].cells[0].caption
    assert [f"{number:.2f}" for number in saved["masking"][1]] == re.findall(r"\d\.\d+", words)


# ---- Similar training images, and labels in doubt ----


def of_own(shipped, tmp_path, **train_config):
    """Flags for the shipped model with a history of its own."""
    save_checkpoint(tmp_path / "own.pt", shipped, train_config=train_config)
    return "--checkpoint", "own.pt", "--output-dir", "out"


def test_similar_training_images_are_beside_the_map(run, drawn, shipped, few_images, tmp_path):
    # The test images are the training images here: the nearest is the image itself.
    flags = of_own(shipped, tmp_path)
    run("--index", 499, 0, "--similar", 2, *flags)
    contact = drawn.pop("out/contact_sheet.png")[0]
    assert (contact.columns, len(contact.cells)) == (3, 6)
    for sheet, _, _ in drawn.values():
        i = int(sheet.file_name[:5])
        predicted, other = sheet.cells[-2:]
        own = other if i == 499 else predicted  # 499 is a Coat that is taken for a Shirt
        assert own.caption.endswith(f"labelled {CLASS_NAMES[few_images[1][i]]}")
        assert own.labels[0] in ("0.00", "0.01") and len(own.panels) == 2
        assert np.array_equal(own.panels[0][0], few_images[0][i, 0])
        assert {predicted.caption, other.caption} < {cell.caption for cell in contact.cells}


def test_wrong_labels_of_held_out_images_are_found(
    run, drawn, shipped, few_images, use, monkeypatch, capsys, tmp_path
):
    images, labels = few_images
    wrong = torch.arange(0, 500, 7)
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 10
    use(images, labels)
    # A model that saw all training labels is asked about test images.
    assert run("--label-errors", 1, *of_own(shipped, tmp_path, val_size=0)) == 0
    line, note, _ = capsys.readouterr().out.splitlines()
    assert line.startswith("test image ")
    assert note == "note: these are test images, since training held no images out"
    held_out = dataset.split_indices(labels, 200, 3)[1]
    flags = of_own(shipped, tmp_path, val_size=200, seed=3)
    assert run("--label-errors", 200, *flags) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    found = [int(re.match(r"training image (\d+): true", line).group(1)) for line in lines]
    assert not set(found) - set(held_out.tolist())
    planted = set(wrong.tolist()) & set(held_out.tolist())
    assert len(planted & set(found)) > 0.8 * len(planted) > 20
    assert len(set(found) - planted) < 8
    confidence, answers = probabilities(shipped, images[found]).max(dim=1)
    assert (answers != labels[found]).all() and (confidence.diff() < 1e-5).all()
    sheet = drawn["out/label_errors.png"][0]
    assert sheet.title.startswith("labels that")
    assert [int(cell.caption.split(":")[0]) for cell in sheet.cells[::3]] == found
    for cell, label in zip(sheet.cells[2::3], labels[found], strict=True):
        assert cell.caption.endswith(f"labelled {CLASS_NAMES[label]}")
    # Where the similar images do not agree with the answer, the label is in no doubt.
    monkeypatch.setattr(features, "labels_of_nearest", lambda tokens, _: torch.tensor(10))
    assert "ask for others" in run("--label-errors", 200, *flags)


# ---- One's own pictures and checkpoints ----


def save_garment(path):
    pixels = np.full((90, 60), 255, np.uint8)
    pixels[5:85, 10:50], pixels[30:85, 27:33] = 60, 255
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.filterwarnings("ignore:Glyph")  # pytest shows what the script leaves unsaid
def test_one_bad_file_does_not_stop_the_others(run, small_model, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    odd = ["my $^$ 靴.png", os.fsdecode(b"a\xfcb\x1b.png"), "b" * 251 + ".png"]
    for name in odd:  # matplotlib would read $^$ as a formula
        save_garment(tmp_path / name)
    save_checkpoint(tmp_path / "\x1b[3J.pt", small_model)
    flags = ("--checkpoint", "\x1b[3J.pt", "--output-dir", "out")
    run("--image", odd[0], "--html", *flags)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    assert "�[3J.pt" in (tmp_path / "out" / "index.html").read_text()
    capsys.readouterr()
    status = run("--image", "text.png", *odd, "missing\x1b.png", *flags)
    assert status == "Visulization.py: error: 2 of 5 pictures could not be explained"
    output = capsys.readouterr()
    errors = [line.split(":")[0] for line in output.err.splitlines()]
    assert errors == ["text.png", "missing�.png"]
    *lines, last = output.out.splitlines()
    assert last.endswith(f" (model: {tmp_path.name}/�[3J.pt)")
    assert [line.split(": ")[0] for line in lines] == [odd[0], "a�b�.png", odd[2]]
    names = {path.name.split("_as_")[0] for path in (tmp_path / "out").glob("*.png")}
    assert names == {"my $^$ 靴", "a�b�", "b" * 50}


def test_folders_are_looked_into(run, drawn, tmp_path):
    for name in ("x/b.png", "x/a.jpg", "x/.hidden.png", "y/a.png"):
        save_garment(tmp_path / name)
    assert run("--image", "x", "y/a.png", "--target-class", "Bag", "--save-arrays") == 0
    paths = [path.split("_as_")[0] for path in drawn]
    assert paths == [f"HeapImg/pictures/{name}" for name in ("a", "b", "a_2")]
    saved = np.load(tmp_path / "HeapImg/pictures/heatmaps.npz")
    assert saved["labels"].tolist() == saved["indices"].tolist() == [-1] * 3
    assert saved["target_classes"].tolist() == [8] * 3
    (tmp_path / "empty").mkdir()
    assert run("--image", "empty") == 2


@pytest.fixture
def of_photographs(monkeypatch, small_model, tmp_path):
    """A checkpoint in the place of the shipped one of photographs."""
    path = tmp_path / "shipped" / "photographs.pt"
    save_checkpoint(path, small_model)
    for module in (Visulization, explanation):
        monkeypatch.setattr(module, "PHOTOGRAPHS_CHECKPOINT", path)
    return path


@pytest.mark.parametrize(
    "probability, answer",
    [(UNSURE - 0.01, "unsure: Sandal {:.0%}, Bag {:.0%}"), (UNSURE + 0.01, "Sandal {:.0%}")],
)
def test_an_unsure_answer_says_what_else_it_may_be(
    run, drawn, capsys, test_split, monkeypatch, of_photographs, probability, answer
):
    image, red = test_split[0][8, 0].numpy(), np.full((50, 100, 3), (200, 30, 30), np.uint8)
    monkeypatch.setattr(Visulization, "read_image", lambda path: (image, red))
    p = torch.zeros(1, 10)
    p[0, [5, 8]] = torch.tensor([probability, 1 - probability])
    monkeypatch.setattr(explanation, "classify", lambda _, images: p.expand(len(images), -1))
    assert run("--image", "x.png", "--versus", "Trouser") == 0
    line, wrote = capsys.readouterr().out.splitlines()
    answer = answer.format(probability, 1 - probability)
    assert line == f"x.png: {answer}" and wrote.endswith(" (model: photographs)")
    ((sheet, _, source),) = drawn.values()
    (cell,) = sheet.cells
    assert sheet.title == line and source.endswith("model: photographs)")
    assert cell.labels == ["photograph", "input", "heatmap", "overlay"]
    assert cell.caption.startswith("for Sandal, not Trouser")
    assert (cell.panels[0][0][110:290] == (200, 30, 30)).all()
    assert np.array_equal(cell.panels[1][0], image)


def test_pictures_have_a_model_of_their_own(run, drawn, tmp_path, small_model, of_photographs):
    def source(*flags):
        drawn.clear()
        assert run(*flags) == 0
        ((path, (_, _, words)),) = drawn.items()
        return path.split("/")[1], words.split("model: ")[1].rstrip(")")

    save_garment(tmp_path / "x.png")
    record = "--checkpoint", Visulization.SHIPPED_CHECKPOINT
    assert source("--image", "x.png") == ("pictures", "photographs")
    found = source("--index", 0, "--checkpoint", of_photographs)
    assert found == ("shipped_photographs", "photographs")
    assert source("--image", "x.png", *record) == ("shipped_model", "record")
    save_checkpoint(tmp_path / "mine" / "best.pt", small_model)
    assert source("--index", 0, "--checkpoint=~/mine/best.pt") == ("mine_best", "mine/best.pt")


# ---- What is refused ----


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--target-layer blocks.77", "--target-layer: the model has no layer 'blocks.77'"),
        ("--output-dir file", "cannot write file/00000_Trouser_as_Trouser.png: File exists"),
        ("--worst 3", "ask for others"),
        ("--num-images 0", "--num-images: 0: give a whole number from 1 to 200"),
        ("--index 0 1", "--index: give numbers from 0 to 0"),
        ("--image x.png --classes 1", "no use for"),
        ("--average --similar 2", "no use for"),
        ("--all-classes --versus next", "no use for"),
    ],
)
def test_what_cannot_be_done_is_refused(run, capsys, tmp_path, use, few_images, flags, words):
    (tmp_path / "file").touch()
    use(*(part[2:3] for part in few_images))  # a trouser
    status = run(*flags.split())
    said = status if isinstance(status, str) else capsys.readouterr().err.strip()
    assert status and words in said and "\n" not in said
    assert said.startswith("Visulization.py: error: ")


def test_help_and_a_missing_libgl(run, monkeypatch, capsys):
    assert run("--help") == 0 and "--compare-layers" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "explaining.photo")
    with pytest.raises(SystemExit, match="pip install opencv-python-headless") as stop:
        runpy.run_path(str(ROOT / "Visulization.py"))
    assert "\n" not in stop.value.code
