"""A page to browse explained images on: one HTML file that needs no server and no other file."""

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
from explaining.explanation import Explanation
from explaining.sheets import COLOR_MAPS, SCALES, colorize, on_one_scale

PAGE = Template(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))
PANEL = Template(
    '<div><button class="picture"><img class="input" src="$image" alt="$name">'
    '<img class="heat" src="$heat" alt="heatmap $role">$none</button>$role<br>$masked</div>'
)
FIGURE = Template(
    '<figure id="$link" data-true="$true" data-predicted="$predicted" data-result="$result"'
    ' data-confidence="$confidence" data-effect="$effect"><div class="panels">$panels</div>'
    '<figcaption><a href="#$link">$name</a>: $answer</figcaption></figure>'
)


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or BGRA (H, W, 4), as a PNG inside an HTML attribute."""
    _, png = cv2.imencode(".png", pixels)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def figure(e: Explanation) -> str:
    """An image under the heatmap of each explained class, its answer, and the values to sort by."""
    name, panels = html.escape(e.name), ""
    for label, heatmap in on_one_scale(e.heatmaps).items():
        colors = cv2.cvtColor(colorize(heatmap, e.versus >= 0), cv2.COLOR_RGBA2BGRA)
        panels += PANEL.substitute(
            image=data_url(e.image),
            name=name,
            heat=data_url(colors),
            role=e.role(label),
            none="" if heatmap.any() else '<span class="none">no evidence</span>',
            masked=e.masked_words(label),
        )
    true, result = "", ""
    if e.label >= 0:
        true = CLASS_NAMES[e.label]
        result = "right" if e.label == e.predicted else "wrong"
    hottest, anywhere = e.masked_probability[e.target]
    if not e.heatmaps[e.target].any():
        hottest = anywhere
    return FIGURE.substitute(
        link=quote(e.file_stem if e.index < 0 else str(e.index)),
        true=true,
        predicted=CLASS_NAMES[e.predicted],
        result=result,
        confidence=f"{e.probabilities.max():.4f}",
        effect=f"{anywhere - hottest:.4f}",
        panels=panels,
        name=name,
        answer=e.answer(),
    )


def save_gallery(
    explanations: list[Explanation], model_name: str, method: str, layers: list[str], path: Path
) -> None:
    """Write a page that shows the images, filters them by class and result, and sorts them."""
    is_signed = explanations[0].versus >= 0
    color_map = colormaps[COLOR_MAPS[is_signed]]
    steps = [color_map(i / 8, bytes=True) for i in range(9)]
    page = PAGE.substitute(
        count=len(explanations),
        model_name=html.escape(model_name),
        method=method,
        layers=html.escape(" + ".join(layers)),
        scale=SCALES[is_signed],
        lowest=-1 if is_signed else 0,
        colors=", ".join(f"rgb({red} {green} {blue})" for red, green, blue, _ in steps),
        figures="\n".join(map(figure, explanations)),
    )
    with whole_file(path) as file:
        file.write(page.encode())
