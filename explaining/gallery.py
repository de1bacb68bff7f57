"""A page to browse explained images on: one HTML file that needs no server and no other file."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib.colors import to_hex
from PIL import Image

from common.files import whole_file
from explaining.explanation import Explanation
from explaining.sheets import paint_all, scale_of


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or RGBA (H, W, 4), as a PNG in an address."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def save_gallery(path: Path, explanations: list[Explanation], source: str) -> None:
    """Write a page that shows the images, filters and sorts them."""
    template = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    scale = scale_of(explanations[0])
    page = Template(template, autoescape=True).render(
        explanations=explanations,
        source=source,
        scale=scale,
        colors=[to_hex(scale.color_map(i / 8)) for i in range(9)],
        paint_all=paint_all,
        data_url=data_url,
    )
    with whole_file(path) as file:
        file.write(page.encode())
