"""The gallery that `--html` writes: as a parser reads it, and in a real browser."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import dataset
from gradcam import GradCAM
from model import load_checkpoint

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
import Visulization
from explaining.explanation import Explanation
from explaining.gallery import save_gallery

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
INDEX = [1104, 0, 3531, 2985, 1, 23]
HOSTILE_NAME = "<b>&\"x'<img src=x onerror=alert(1)> $x.png"


@pytest.fixture(scope="module")
def explanations(test_split):
    """Of six test images, some of them errors, and of a picture whose name is markup."""
    model = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]
    cam = GradCAM(model, Visulization.default_layers(model), "layercam")
    images, labels = (part[INDEX] for part in test_split)
    (own,) = Visulization.explain(cam, images[1:2], torch.tensor([-1]), [-1])
    own.file_stem, own.masked_probability = 'a "b" c', {own.target: (0.5, 0.4)}
    own.name, own.heatmaps = HOSTILE_NAME, {own.target: np.zeros((28, 28), np.float32)}
    return [*Visulization.explain(cam, images, labels, INDEX), own]


@pytest.fixture(scope="module")
def page(tmp_path_factory, explanations):
    path = tmp_path_factory.mktemp("gallery") / "index.html"
    save_gallery(explanations, "a <b>/model.pt", "layercam", ["stem.x"], path)
    return path


class Figures(HTMLParser):
    """Reads the page's figures: their attributes, the images in them, and their text."""

    def __init__(self, page):
        super().__init__()
        self.attributes, self.images, self.texts = [], [], [""]
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "figure":
            self.attributes.append(dict(attributes))
            self.images.append([])
            self.texts.append("")
        if tag == "img":
            self.images[-1].append(dict(attributes))

    def handle_data(self, text):
        self.texts[-1] += text


def decode(image):
    """The pixels of an image in a page."""
    kind, content = image["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("no Chromium with its driver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = "headless no-sandbox disable-gpu disable-dev-shm-usage window-size=1200,900"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.fail(f"{BROWSER} does not start: {error.msg}")
    yield driver
    driver.quit()


def shown(browser):
    """What the visible figures are about."""
    figures = browser.find_elements(By.TAG_NAME, "figure")
    return [figure.text.splitlines()[-1] for figure in figures if figure.is_displayed()]


def choose(browser, name, text):
    Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def complaints(browser):
    """Scripts that failed, or what was asked for from outside."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_each_image_is_beside_its_own_words_on_a_page_that_stands_alone(page, explanations):
    page = page.read_text(encoding="utf-8")
    assert len(page) < 70_000 and "default-src 'none'" in page
    assert not re.search("https?://|<link|url\\(", page)
    found = Figures(page)
    before, *texts = found.texts
    words = "Images: 7. Model: a <b>/model.pt. Heatmaps: layercam of stem.x, share of the evidence"
    assert words in before
    columns = explanations, found.attributes, found.images, texts
    for e, data, images, text in zip(*columns, strict=True):
        assert f"{e.name}: {e.answer()}" in text
        assert all(f"{e.role(k)}{e.masked_words(k)}" in text for k in e.heatmaps)
        names = [f"heatmap {e.role(k)}" for k in e.heatmaps]
        assert [image["alt"] for image in images[1::2]] == names
        for image in images[::2]:
            assert image["alt"] == e.name and np.array_equal(decode(image), e.image)
        peak = max(heatmap.max() for heatmap in e.heatmaps.values()) or 1
        for image, heatmap in zip(images[1::2], e.heatmaps.values(), strict=True):
            share = (decode(image)[..., 3] / 255 / 0.9) ** 2  # of the largest, from the opacity
            assert share == pytest.approx(heatmap / peak, abs=0.01)
        result = {-1: "", e.predicted: "right"}.get(e.label, "wrong")
        hottest, anywhere = e.masked_probability[e.target]
        expected = {
            "result": result,
            "predicted": dataset.CLASS_NAMES[e.predicted],
            "true": dataset.CLASS_NAMES[e.label] if result else "",
            "effect": f"{anywhere - hottest:.4f}" if result else "0.0000",
        }
        assert {key: data[f"data-{key}"] for key in expected} == expected
        assert f'<a href="#{data["id"]}">' in page
    assert found.attributes[0]["id"] == "1104" and found.attributes[-1]["id"] == "a%20%22b%22%20c"
    assert "no evidence" in texts[-1]


@pytest.mark.parametrize(
    "versus, weaker, colors, lowest",
    [
        # A quarter of the largest share has the colour at a quarter of "inferno" and half of the
        # largest opacity, 0.9; of a contrast, that at 0.375 of "berlin", where 0.5 is black.
        (-1, 0.2, ([252, 255, 164, 230], [87, 16, 110, 115]), "0"),
        (6, -0.2, ([255, 173, 173, 230], [19, 48, 62, 57]), "-1"),
    ],
)
def test_heatmaps_have_the_colours_of_the_sheets(tmp_path, versus, weaker, colors, lowest):
    heatmap, image = np.zeros((28, 28), np.float32), np.zeros((28, 28), np.uint8)
    heatmap[3, 3], heatmap[20, 5] = 0.8, weaker
    probabilities = np.array([0, 0, 0, 0.1, 0.2, 0, 0.7, 0, 0, 0])
    e = Explanation("", "", 0, image, 4, probabilities, 4, {4: heatmap}, {4: (0.02, 0.09)}, versus)
    save_gallery([e], "", "", [], tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    found = Figures(page)
    heat = decode(found.images[0][1])
    assert np.abs(heat[[3, 20], [3, 5]] - colors).max() <= 2 and heat[10, 10, 3] == 0
    *_, last = re.findall(r"rgb\((.+?)\)", page)
    assert [int(part) for part in last.split()] == pytest.approx(colors[0][:3], abs=2)
    assert f"\n{lowest}  1. Press" in found.texts[0]
    # Explained for the true class: the answer is still another, and the confidence is the answer's.
    assert "true Coat 20%, predicted Shirt 70%" in found.texts[1]
    values = [found.attributes[0][f"data-{key}"] for key in ("result", "confidence", "effect")]
    assert values == ["wrong", "0.7000", "0.0700"]


def test_images_are_filtered_by_class_and_result(browser, page):
    browser.get(page.as_uri())
    everything, count = shown(browser), browser.find_element(By.ID, "shown")
    assert len(everything) == 7 and count.text == "7 of 7 images"
    options = [option.text for option in Select(browser.find_element(By.ID, "true")).options]
    assert options[0] == "all" and "" not in options  # one image has no true class
    # A heatmap lies exactly over its image.
    script = "[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().toJSON()])"
    pictures = browser.execute_script(f"return {script}")
    assert all(width == 28 and box["width"] == 168 for width, box in pictures)
    assert pictures[::2] == pictures[1::2]

    choose(browser, "result", "wrong")
    wrong = len(shown(browser))
    assert 3 <= wrong < 6 and count.text == f"{wrong} of 7 images"
    choose(browser, "true", "Coat")
    assert [line.split(",")[0] for line in shown(browser)] == ["test image 1104: true Coat 13%"]
    choose(browser, "predicted", "Ankle boot")
    assert shown(browser) == [] and count.text == "0 of 7 images"
    for name in ("result", "true", "predicted"):
        choose(browser, name, "all")
    assert shown(browser) == everything and complaints(browser) == []


def test_images_are_sorted_by_confidence_and_by_what_masking_changes(browser, page):
    browser.get(page.as_uri())
    everything = shown(browser)
    choose(browser, "order", "by confidence")
    percents = [int(re.search(r"predicted \D+(\d+)%", line).group(1)) for line in shown(browser)]
    assert percents == sorted(percents, reverse=True) and len(set(percents)) > 2
    choose(browser, "order", "by effect of masking the hottest tenth")
    figures = browser.find_elements(By.TAG_NAME, "figure")
    changes = [float(figure.get_attribute("data-effect")) for figure in figures]
    assert changes == sorted(changes, reverse=True) and min(changes) < 0 < max(changes)
    choose(browser, "order", "of the page")
    assert shown(browser) == everything and complaints(browser) == []


def test_the_arrow_keys_move_among_the_pictures_that_are_shown(browser, page):
    browser.get(page.as_uri())
    choose(browser, "result", "wrong")
    figures = browser.find_elements(By.CSS_SELECTOR, "figure:not([hidden])")
    ids = [figure.get_attribute("id") for figure in figures]
    browser.execute_script("document.activeElement.blur()")

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.execute_script("return document.activeElement.closest('figure').id")

    keys = [Keys.ARROW_RIGHT] * (len(ids) + 1) + [Keys.ARROW_LEFT] * 2
    assert [press(key) for key in keys] == [*ids, ids[0], ids[-1], ids[-2]]
    browser.execute_script("document.activeElement.blur()")
    assert press(Keys.ARROW_LEFT) == ids[-1]


def test_a_picture_has_a_link_and_is_shown_without_its_heatmap_while_pressed(browser, page):
    for link, name in (("1104", "test image 1104"), ("a%20%22b%22%20c", HOSTILE_NAME)):
        browser.get(f"{page.as_uri()}#{link}")
        target = browser.find_element(By.CSS_SELECTOR, "figure:target")
        address = target.find_element(By.TAG_NAME, "a").get_attribute("href")
        assert name in target.text and address.endswith(f"#{link}")
        picture, heat = (target.find_element(By.CLASS_NAME, name) for name in ("picture", "heat"))
        ActionChains(browser).click_and_hold(picture).perform()
        assert (
            not heat.is_displayed() and target.find_element(By.CLASS_NAME, "input").is_displayed()
        )
        ActionChains(browser).release().perform()
        assert heat.is_displayed()
        choose(browser, "result", "wrong")  # this filters out what the next link is of
