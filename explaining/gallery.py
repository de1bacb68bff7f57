"""A page to browse explained images on: one HTML file that needs no server and no other file."""

import base64
import html
import io
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from common.files import whole_file
from explaining.explanation import Explanation
from explaining.sheets import paint_all, scale_of

PAGE = Template(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))
PANEL = Template(
    '<div><button><img src="$image" alt="$name"><img class="heat" src="$heat" alt="heatmap">'
    "</button>$caption</div>"
)
FIGURE = Template(
    '<figure id="$link" data-true="$true" data-predicted="$predicted" data-result="$result"'
    ' data-map="$map" data-confidence="$confidence">'
    '<div class="panels">$panels</div>$similar'
    '<figcaption><a href="#$link">$name</a>: $answer</figcaption></figure>'
)


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or RGBA (H, W, 4), as a PNG inside an HTML attribute."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def figure(e: Explanation) -> str:
    """An image under the heatmap of each explained class, its answer, and the values to sort by."""
    name, panels = html.escape(e.name), ""
    for evidence, (_, _, overlay) in zip(e.evidence, paint_all(e), strict=True):
        image, heat = map(data_url, overlay)
        caption = html.escape(evidence.caption())
        panels += PANEL.substitute(image=image, name=name, heat=heat, caption=caption)
    similar = ""
    for cell in e.similar:
        images = [f'<img src="{data_url(*panel)}" alt="training image">' for panel in cell.panels]
        words = f"{cell.caption}: {', '.join(cell.labels)}"
        similar += f'<p class="similar {cell.color}">{"".join(images)} {words}</p>'
    true, result = "", ""
    if e.label >= 0:
        true = html.escape(e.class_names[e.label])
        result = "right" if e.label == e.predicted else "wrong"
    return FIGURE.substitute(
        link=quote(e.file_stem),
        true=true,
        predicted=html.escape(e.class_names[e.predicted]),
        result=result,
        confidence=e.probabilities.max(),
        map=e.evidence[0].verdict(),
        panels=panels,
        similar=similar,
        name=name,
        answer=html.escape(e.answer()),
    )


def save_gallery(path: Path, explanations: list[Explanation], source: str) -> None:
    """Write a page that shows the images, filters and sorts them."""
    scale = scale_of(explanations[0])
    page = PAGE.substitute(
        source=html.escape(source),
        scale=scale.words,
        lowest=scale.lowest,
        colors=", ".join(to_hex(scale.color_map(i / 8)) for i in range(9)),
        figures="\n".join(map(figure, explanations)),
    )
    with whole_file(path) as file:
        file.write(page.encode())
