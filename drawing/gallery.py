"""A page to browse explained images on: one HTML file that needs no server, no network and no other file."""

import base64
import html
from pathlib import Path
from string import Template
from urllib.parse import quote

import cv2
import numpy as np
from matplotlib import colormaps

from common.files import whole_file
from dataset import CLASS_NAMES
from drawing.explanation import Explanation
from drawing.sheets import COLOR_MAP, SCALE_LABEL, SIGNED_COLOR_MAP, SIGNED_SCALE_LABEL, colorize, on_one_scale

PAGE = Template(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or BGRA (H, W, 4), as a PNG inside an HTML attribute."""
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", pixels)[1]).decode()


def figure(e: Explanation) -> str:
    """An image under the heatmap of each explained class, with the answer below, a link and the values to sort by."""
    name, image, panels = html.escape(e.name), data_url(e.image), ""
    for label, heatmap in on_one_scale(e.heatmaps).items():
        heat = data_url(cv2.cvtColor(colorize(heatmap, e.versus >= 0), cv2.COLOR_RGBA2BGRA))
        none = "" if heatmap.any() else '<span class="none">no evidence</span>'
        panels += f'<div><button class="picture"><img class="input" src="{image}" alt="{name}"><img class="heat" '
        panels += f'src="{heat}" alt="heatmap {e.role(label)}">{none}</button>{e.role(label)}<br>{e.trust(label)}</div>'
    true = CLASS_NAMES[e.label] if e.label >= 0 else ""
    result = "" if e.label < 0 else "right" if e.label == e.predicted else "wrong"
    data = f'data-true="{true}" data-predicted="{CLASS_NAMES[e.predicted]}" data-result="{result}"'
    hottest, anywhere = e.hidden[e.target] if e.heatmaps[e.target].any() else (0, 0)
    data += f' data-confidence="{e.probabilities.max():.4f}" data-trust="{anywhere - hottest:.4f}"'
    link = quote(e.stem if e.index < 0 else str(e.index))
    caption = f'<figcaption><a href="#{link}">{name}</a>: {e.answer()}</figcaption>'
    return f'<figure id="{link}" {data}><div class="panels">{panels}</div>{caption}</figure>'


def save_gallery(explanations: list[Explanation], model_name: str, method: str, layers: list[str], path: Path) -> None:
    """Write a page that shows the images, filters them by class and result, and sorts them."""
    is_signed = explanations[0].versus >= 0
    color_map = colormaps[SIGNED_COLOR_MAP if is_signed else COLOR_MAP]
    colors = ", ".join("rgb({:.0%} {:.0%} {:.0%})".format(*color_map(i / 8)[:3]) for i in range(9))
    names = dict(model_name=html.escape(model_name), layers=html.escape(" + ".join(layers)), method=method)
    scale = f"evidence {SIGNED_SCALE_LABEL}" if is_signed else f"{SCALE_LABEL}, in the image"
    names |= dict(scale=scale, lowest="-1" if is_signed else "0")
    figures = "\n".join(map(figure, explanations))
    page = PAGE.substitute(names, count=len(explanations), colors=colors, figures=figures)
    with whole_file(path) as file:
        file.write(page.encode())
