"""The gallery that `--html` writes, in a real browser without a network."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    if not (BROWSER and DRIVER):
        pytest.skip("no Chromium with its driver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.add_argument("--window-size=1200,900")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.fail(f"{BROWSER} does not start: {error.msg}")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("gallery")
    flags = ["--html", "--index", 1917, 0, 3531, 2920, 1, 23, "--data-dir", data_dir, "--output-dir", folder]
    command = [sys.executable, ROOT / "Visulization.py", *flags]
    subprocess.run([str(word) for word in command], check=True, timeout=300)
    return folder / "index.html"


def shown(browser):
    """What the visible figures are about."""
    figures = browser.find_elements(By.TAG_NAME, "figure")
    return [figure.text.splitlines()[-1] for figure in figures if figure.is_displayed()]


def choose(browser, name, text):
    Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def test_the_page_stands_alone(gallery):
    page = gallery.read_text(encoding="utf-8")
    assert len(page) < 60_000  # for six images
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>]+)', page)
    assert len(sources) >= 12 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page


def test_images_are_filtered_by_class_and_result(browser, gallery):
    browser.get(gallery.as_uri())
    everything = shown(browser)
    assert len(everything) == 6 and "6 of 6 images" in browser.page_source
    # The pictures are really there, and a heatmap lies exactly over its image.
    script = "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().toJSON()])"
    pictures = browser.execute_script(script)
    assert all(width == 28 and box["width"] == 168 for width, box in pictures)
    assert all(image[1] == heat[1] for image, heat in zip(pictures[::2], pictures[1::2], strict=True))

    choose(browser, "result", "wrong")
    wrong = shown(browser)
    assert len(wrong) == browser.page_source.count('data-result="wrong"') and 3 <= len(wrong) < 6
    assert browser.find_element(By.ID, "shown").text == f"{len(wrong)} of 6 images"
    choose(browser, "true", "Coat")
    assert [line.split(",")[0] for line in shown(browser)] == ["test image 1917: true Coat 3%"]
    choose(browser, "predicted", "Dress")
    assert shown(browser) == [] and browser.find_element(By.ID, "shown").text == "0 of 6 images"
    for name in ("result", "true", "predicted"):
        choose(browser, name, "all")
    assert shown(browser) == everything

    script = "const s = document.getElementById('opacity'); s.value = 0; s.dispatchEvent(new Event('input'))"
    browser.execute_script(script)
    assert browser.find_element(By.CLASS_NAME, "heat").value_of_css_property("opacity") == "0"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_name_of_a_picture_is_text_not_markup(browser, run_script, test_split, tmp_path):
    name = "<img src=x onerror=alert(1)> & 'shoe'.png"
    Image.fromarray(test_split[0][0, 0].numpy()).save(tmp_path / name)
    result = run_script("Visulization.py", "--html", "--image", name)
    assert result.returncode == 0, result.stderr
    browser.get((tmp_path / "HeapImg" / "index.html").as_uri())
    assert shown(browser)[0].startswith(name) and len(browser.find_elements(By.TAG_NAME, "img")) == 2
    assert Select(browser.find_element(By.ID, "true")).options[0].text == "all"
