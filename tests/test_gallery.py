"""The gallery that `--html` writes: its text, and what it does in a real browser."""

import base64
import html
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from dataset import CLASS_NAMES
from gradcam import GradCAM

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
from explaining.explanation import Evidence, Explanation, explain, mask_evidence
from explaining.gallery import save_gallery
from explaining.sheets import Cell

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
INDEX = [1104, 0, 3531, 2985, 1, 23]
HOSTILE_NAME = "<b>&\"x'</script><img src=x onerror=alert(1)> {{ x }}.png"
SOURCE = "layercam of stem.x in a <b>/model.pt"


@pytest.fixture(scope="module")
def explanations(shipped, test_split):
    """Of six test images, some of them errors, and a picture whose name is markup."""
    cam = GradCAM(shipped, ["stem.stage0_2", "stem.down1"], "layercam")
    images, labels = (part[INDEX] for part in test_split)
    (own,) = explain(cam, images[1:2], torch.tensor([-1]))
    own.name, own.file_stem = HOSTILE_NAME, 'a "b" c'
    own.evidence[0].heatmap[:] = 0
    found = explain(cam, images, labels)
    for e, i in zip(found, INDEX, strict=True):
        e.name, e.file_stem = f"test image {i}", f"{i:05d}"
    found.append(own)
    mask_evidence(shipped, found)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory, explanations):
    path = tmp_path_factory.mktemp("gallery") / "index.html"
    save_gallery(path, explanations, SOURCE)
    return path


def text_of(markup):
    return " ".join(html.unescape(re.sub("<[^>]*>", "", markup)).split())


def images_of(markup):
    """The pixels of the images in a part of a page."""
    contents = re.findall('src="data:image/png;base64,([^"]*)"', markup)
    opened = [Image.open(io.BytesIO(base64.b64decode(content))) for content in contents]
    return [np.asarray(image).astype(int) for image in opened]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("no Chromium with its driver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in "headless no-sandbox disable-gpu disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shown(browser):
    """What the visible figures are about."""
    figures = browser.find_elements(By.TAG_NAME, "figure")
    return [figure.text.splitlines()[-1] for figure in figures if figure.is_displayed()]


def choose(browser, name, text):
    Select(browser.find_element(By.NAME, name)).select_by_visible_text(text)


def test_each_image_is_beside_its_own_words_on_a_page_that_stands_alone(page, explanations):
    page = page.read_text(encoding="utf-8")
    assert len(page) < 70_000 and not re.search("https?://|<link|url\\(", page)
    before, *figures = page.split("<figure")
    assert f"Heatmaps: {SOURCE}, evidence, relative to" in text_of(before)
    for e, figure in zip(explanations, figures, strict=True):
        text, images = text_of(figure), images_of(figure)
        assert f"{e.name}: {e.answer()}" in text
        assert all(" ".join(e.caption(evidence).split()) in text for evidence in e.evidence)
        for image, heat, evidence in zip(images[::2], images[1::2], e.evidence, strict=True):
            assert np.array_equal(image, e.image)
            assert heat[..., 3].flat[evidence.heatmap.argmax()] == heat[..., 3].max()
        data = dict(re.findall('data-(\\w+)="([^"]*)"', figure))
        result = {-1: "", e.predicted: "right"}.get(e.label, "wrong")
        true = CLASS_NAMES[e.label] if result else ""
        assert (data["result"], data["true"]) == (result, true)
        assert data["predicted"] == CLASS_NAMES[e.predicted]
    ids = re.findall('<figure id="(.*?)"', page)
    assert ids == re.findall('<a href="#(.*?)"', page)
    assert ids[0] == "01104" and ids[-1] == "a%20%22b%22%20c"


def test_similar_images_and_the_scale_of_a_contrast_are_shown(tmp_path):
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28)
    heatmap, probabilities = np.eye(28, dtype=np.float32), np.eye(10)[6]
    e = Explanation(images[0], 6, probabilities, [Evidence(6, 4, heatmap, (1.0,) * 4)])
    e.similar = [Cell([[images[1]], [images[2]]], "like a Coat", ["1.00", "3.50"], "crimson")]
    save_gallery(tmp_path / "index.html", [e], "")
    before, figure = (tmp_path / "index.html").read_text().split("<figure ")
    assert np.array_equal(images_of(figure)[2:], images[1:])
    assert "like a Coat: 1.00, 3.50" in text_of(figure) and 'class="similar crimson"' in figure
    assert re.search("linear-gradient.to right, #0070ff.*#e8002a", before)
    assert ": -1 1." in text_of(before)


def test_images_are_filtered_and_sorted(browser, page, explanations):
    browser.get(page.as_uri())
    everything, count = shown(browser), browser.find_element(By.TAG_NAME, "output")
    assert len(everything) == 7 and count.text == "7 of 7 images"
    choose(browser, "result", "wrong")
    wrong = len(shown(browser))
    assert 3 <= wrong < 6 and count.text == f"{wrong} of 7 images"
    choose(browser, "true", "Coat")
    assert [line.split(",")[0] for line in shown(browser)] == ["test image 1104: true Coat 13%"]
    choose(browser, "predicted", "Ankle boot")
    assert shown(browser) == []
    for name in ("result", "true", "predicted"):
        choose(browser, name, "all")
    options = [option.text for option in Select(browser.find_element(By.NAME, "true")).options]
    assert options[0] == "all" and "" not in options  # one image has no true class
    choose(browser, "order", "by confidence")
    percents = [line[-3:] for line in shown(browser)]
    assert percents == sorted(percents, reverse=True) and len(set(percents)) > 2
    for words in ("something", "little"):
        choose(browser, "map", f"says {words}")
        names = {e.name for e in explanations if words in e.evidence[0].verdict()}
        assert {line.split(": ")[0] for line in shown(browser)} == names != set()
    choose(browser, "map", "all")
    choose(browser, "order", "of the page")
    assert shown(browser) == everything


def test_a_picture_has_a_link_and_is_shown_without_its_heatmap_while_pressed(browser, page):
    browser.get(f"{page.as_uri()}#a%20%22b%22%20c")
    target = browser.find_element(By.CSS_SELECTOR, "figure:target")
    assert HOSTILE_NAME in target.text
    # A heatmap lies exactly over its image.
    script = "[...document.images].map(i => i.getBoundingClientRect().toJSON())"
    boxes = browser.execute_script(f"return {script}")
    assert boxes[::2] == boxes[1::2]
    assert all((box["width"], box["height"]) == (168, 168) for box in boxes)
    heat = target.find_element(By.CLASS_NAME, "heat")
    ActionChains(browser).click_and_hold(target.find_element(By.TAG_NAME, "button")).perform()
    assert target.find_element(By.TAG_NAME, "img").is_displayed() and not heat.is_displayed()
    ActionChains(browser).release().perform()
    assert heat.is_displayed()
    # Scripts that failed, or what was asked for from outside.
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
