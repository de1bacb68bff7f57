"""The gallery that `--html` writes, in a real browser without a network."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from gradcam import GradCAM
from model import load_checkpoint

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
import Visulization
from drawing import gallery

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
INDEX = [1104, 0, 3531, 2985, 1, 23]
HOSTILE_NAME = "<img src=x onerror=alert(1)> & \"my\" 'shoe' $x.png"


@pytest.fixture(scope="module")
def page(tmp_path_factory, test_split):
    """A gallery of six test images, some of them errors, and of a picture with a name that is markup."""
    model = load_checkpoint(Visulization.SHIPPED_CHECKPOINT)[0]
    cam = GradCAM(model, Visulization.default_layers(model), "layercam")
    images, labels = (part[INDEX] for part in test_split)
    explanations = Visulization.explain(cam, images, labels, INDEX)
    (own,) = Visulization.explain(cam, images[1:2], torch.tensor([-1]), [-1])
    own.stem, own.hidden = 'a "b" c', {own.target: (0.5, 0.4)}
    own.name, own.heatmaps = HOSTILE_NAME, {own.target: np.zeros((28, 28), np.float32)}
    path = tmp_path_factory.mktemp("gallery") / "index.html"
    gallery.save_gallery([*explanations, own], "a <b>/model.pt", "layercam", ["stem.x"], path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("no Chromium with its driver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1200,900")
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
    """What the browser has to say against the page: scripts that fail, or something from outside."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    sources = re.findall(
        r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>]+)', text.replace("src=x", "").replace("&lt;img", "")
    )
    assert len(sources) >= 14 and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text
    assert len(text) < 70_000


def test_its_pictures_have_the_right_pixels(page, test_split):
    sources = re.findall(
        r'class="(?:input|heat)" src="data:image/png;base64,([^"]+)"', page.read_text(encoding="utf-8")
    )
    image, shirt, _, coat = (Image.open(io.BytesIO(base64.b64decode(source))) for source in sources[:4])
    assert np.array_equal(np.asarray(image), test_split[0][1104, 0].numpy())
    shirt, coat = np.asarray(shirt).astype(int), np.asarray(coat).astype(int)
    # The largest share of the two maps has the last colour of "inferno", a light yellow, and nine tenths of opacity.
    hottest = coat.reshape(-1, 4)[coat[..., 3].argmax()]
    assert hottest[:3].tolist() == [252, 254, 164] and hottest[3] == 230
    assert shirt[..., 3].max() < 200  # on the same scale
    # From an opacity follows the share, from the share the colour.
    share = (shirt[..., 3] / 255 / 0.9) ** 2
    assert np.abs(colormaps["inferno"](share)[..., :3] * 255 - shirt[..., :3]).max() < 6


def test_images_are_filtered_by_class_and_result(browser, page):
    browser.get(page.as_uri())
    everything = shown(browser)
    assert len(everything) == 7 and browser.find_element(By.ID, "shown").text == "7 of 7 images"
    assert (
        "Images: 7. Model: a <b>/model.pt. Heatmaps: layercam of stem.x, share of the evidence"
        in browser.find_element(By.TAG_NAME, "p").text
    )
    # The pictures are really there, and a heatmap lies exactly over its image.
    script = "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().toJSON()])"
    pictures = browser.execute_script(script)
    assert all(width == 28 and box["width"] == 168 for width, box in pictures)
    assert all(image[1] == heat[1] for image, heat in zip(pictures[::2], pictures[1::2], strict=True))

    choose(browser, "result", "wrong")
    wrong = shown(browser)
    assert 3 <= len(wrong) < 6
    for line in wrong:  # "test image 1104: true Coat 13%, predicted Shirt 81%"
        true, predicted = re.search(r"true (\D+) \d+%, predicted (\D+) \d", line).groups()
        assert true != predicted
    assert browser.find_element(By.ID, "shown").text == f"{len(wrong)} of 7 images"
    choose(browser, "true", "Coat")
    assert [line.split(",")[0] for line in shown(browser)] == ["test image 1104: true Coat 13%"]
    choose(browser, "predicted", "Ankle boot")
    assert shown(browser) == [] and browser.find_element(By.ID, "shown").text == "0 of 7 images"
    for name in ("result", "true", "predicted"):
        choose(browser, name, "all")
    assert shown(browser) == everything

    script = "const s = document.getElementById('opacity'); s.value = 0; s.dispatchEvent(new Event('input'))"
    browser.execute_script(script)
    assert browser.find_element(By.CLASS_NAME, "heat").value_of_css_property("opacity") == "0"
    assert complaints(browser) == []


def test_images_are_sorted_by_confidence_and_by_what_hiding_changes(browser, page):
    browser.get(page.as_uri())
    everything = shown(browser)
    choose(browser, "order", "by confidence")
    percents = [int(re.search(r"predicted \D+(\d+)%", line).group(1)) for line in shown(browser)]
    assert percents == sorted(percents, reverse=True) and len(set(percents)) > 2
    choose(browser, "order", "by effect of hiding the hottest tenth")
    figures = browser.find_elements(By.TAG_NAME, "figure")
    changes = []
    for figure in figures:
        numbers = re.search(r"hottest tenth ([\d.]+), without a random tenth ([\d.]+)", figure.text)
        assert bool(numbers) == (HOSTILE_NAME not in figure.text)  # its map is empty, so hiding changes nothing
        changes.append(float(numbers[2]) - float(numbers[1]) if numbers else 0.0)
    assert changes == pytest.approx(sorted(changes, reverse=True), abs=0.011) and min(changes) < 0 < max(changes)
    choose(browser, "order", "of the page")
    assert shown(browser) == everything and complaints(browser) == []


def test_a_pressed_picture_is_shown_without_its_heatmap(browser, page):
    browser.get(page.as_uri())
    picture = browser.find_element(By.CLASS_NAME, "picture")
    heat = picture.find_element(By.CLASS_NAME, "heat")
    ActionChains(browser).click_and_hold(picture).perform()
    assert not heat.is_displayed() and picture.find_element(By.CLASS_NAME, "input").is_displayed()
    ActionChains(browser).release().perform()
    assert heat.is_displayed()


def test_the_arrow_keys_move_among_the_pictures_that_are_shown(browser, page):
    browser.get(page.as_uri())
    choose(browser, "result", "wrong")
    ids = [figure.get_attribute("id") for figure in browser.find_elements(By.CSS_SELECTOR, "figure:not([hidden])")]
    browser.execute_script("document.activeElement.blur()")

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.execute_script("return document.activeElement.closest('figure').id")

    keys = [Keys.ARROW_RIGHT] * (len(ids) + 1) + [Keys.ARROW_LEFT] * 2
    assert [press(key) for key in keys] == [*ids, ids[0], ids[-1], ids[-2]]
    browser.execute_script("document.activeElement.blur()")
    assert press(Keys.ARROW_LEFT) == ids[-1]


def test_every_picture_has_a_link(browser, page):
    for link, name in (("1104", "test image 1104"), ("a%20%22b%22%20c", HOSTILE_NAME)):
        browser.get(f"{page.as_uri()}#{link}")
        target = browser.find_element(By.CSS_SELECTOR, "figure:target")
        assert name in target.text and target.find_element(By.TAG_NAME, "a").get_attribute("href").endswith(f"#{link}")
        choose(browser, "result", "wrong")  # this filters out what the next link is of


def test_the_name_of_a_picture_is_text_not_markup(browser, page):
    browser.get(page.as_uri())
    assert shown(browser)[-1].startswith(f"{HOSTILE_NAME}: predicted Ankle boot ")
    *_, own = browser.find_elements(By.TAG_NAME, "figure")
    images = own.find_elements(By.TAG_NAME, "img")
    assert len(images) == 2 and images[0].get_attribute("alt") == HOSTILE_NAME
    assert "no evidence" in own.text
    options = [option.text for option in Select(browser.find_element(By.ID, "true")).options]
    assert options[0] == "all" and "" not in options  # it has no true class
    assert complaints(browser) == []


def test_the_template_opens_in_a_browser_on_its_own(browser):
    browser.get((Visulization.SHIPPED_CHECKPOINT.parents[2] / "drawing" / "gallery.html").as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text == "What the model looks at"
    assert "$figures" in browser.find_element(By.TAG_NAME, "main").text and complaints(browser) == []
