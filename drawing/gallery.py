"""A page to browse explained images on: one HTML file that needs no server, no network and no other file."""

import base64
import html
from pathlib import Path
from string import Template

import cv2
import numpy as np
from matplotlib import colormaps

from dataset import CLASS_NAMES, whole_file
from drawing.sheets import COLOR_MAP, OPACITY, Explanation, on_one_scale

PAGE = Template(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or BGRA (H, W, 4), as a PNG inside an HTML attribute."""
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", pixels)[1]).decode()


def figure(e: Explanation) -> str:
    """An image under the heatmap of each explained class, its answer below."""
    name, image, panels = html.escape(e.name), data_url(e.image), ""
    for label, heatmap in on_one_scale(e.heatmaps).items():
        heat = (colormaps[COLOR_MAP](heatmap) * 255).astype(np.uint8)
        heat[..., 3] = (OPACITY * heatmap**0.5 * 255).round()
        heat = data_url(cv2.cvtColor(heat, cv2.COLOR_RGBA2BGRA))
        none = "" if heatmap.any() else '<span class="none">no evidence</span>'
        panels += f'<div><div class="picture"><img class="input" src="{image}" alt="{name}"><img class="heat" '
        panels += f'src="{heat}" alt="heatmap {e.role(label)}">{none}</div>{e.role(label)}</div>'
    true = CLASS_NAMES[e.label] if e.label >= 0 else ""
    result = "" if e.label < 0 else "right" if e.label == e.predicted else "wrong"
    data = f'data-true="{true}" data-predicted="{CLASS_NAMES[e.predicted]}" data-result="{result}"'
    caption = f"<figcaption>{name}: {e.answer()}</figcaption>"
    return f'<figure {data}><div class="panels">{panels}</div>{caption}</figure>'


def save_gallery(explanations: list[Explanation], model_name: str, method: str, layers: list[str], path: Path) -> None:
    """Write a page that shows the images and filters them by class and result."""
    colors = ", ".join("rgb({:.0%} {:.0%} {:.0%})".format(*colormaps[COLOR_MAP](i / 8)[:3]) for i in range(9))
    names = dict(model_name=html.escape(model_name), layers=html.escape(" + ".join(layers)), method=method)
    figures = "\n".join(map(figure, explanations))
    page = PAGE.substitute(names, count=len(explanations), colors=colors, figures=figures)
    with whole_file(path) as file:
        file.write(page.encode())
