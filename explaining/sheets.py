"""Heatmaps as pictures: one image enlarged, or many on a sheet."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from common.files import whole_file
from dataset import IMAGE_SIZE
from explaining.explanation import Explanation

OPACITY = 0.9  # of the hottest place, when a heatmap is laid over its image
# Legible even when a sheet of three columns is shrunk to a column of text.
FONTS = {
    "font.size": 13,
    "axes.titlesize": "medium",
    "figure.labelsize": "medium",
    "text.parse_math": False,  # a file name may hold a $
}
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a file name may be in any script


class Scale(NamedTuple):
    """How a heatmap is coloured, and what the colour bar says."""

    color_map: Colormap
    lowest: int  # value of a heatmap; the highest is 1
    words: str


# Equal steps of evidence look equally large.
SHARES = Scale(colormaps["inferno"], 0, "evidence, relative to\nthe strongest place")
# The ends are half as light as white: they show on any garment.
ENDS = LinearSegmentedColormap.from_list("contrast", ["#0070ff", "white", "#e8002a"])
WORDS = "evidence for the class (1),\nthe other (-1), relative\nto the strongest place"
CONTRAST = Scale(ENDS, -1, WORDS)
Panel = list[np.ndarray]  # uint8 (H, W), RGB or RGBA, one laid over the other


class Cell(NamedTuple):
    """One place of a sheet: panels side by side, a caption above, labels below."""

    panels: list[Panel]
    caption: str
    labels: Sequence[str] = ()
    color: str = "black"  # of the caption


class Sheet(NamedTuple):
    """A picture file: cells in rows."""

    file_name: str
    title: str
    cells: list[Cell]
    columns: int


def scale_of(e: Explanation) -> Scale:
    """The scale of an image's heatmaps."""
    return SHARES if e.evidence[0].versus < 0 else CONTRAST


def paint(image: np.ndarray, heatmap: np.ndarray, scale: Scale) -> list[Panel]:
    """Panels of an image, uint8 (28, 28), of its heatmap, (28, 28), and of both.

    The largest amount in the heatmap is at most 1. The hotter a place, the more opaque it is.
    """
    colors = scale.color_map((heatmap - scale.lowest) / (1 - scale.lowest), bytes=True)
    veil = colors.copy()
    opacity = np.sqrt(np.abs(heatmap))
    if scale.lowest < 0:  # only the ends' colours: white would hide a dark garment
        veil = scale.color_map((np.sign(heatmap) + 1) / 2, bytes=True)
        opacity = np.abs(heatmap)
    veil[..., 3] = np.rint(255 * OPACITY * opacity)
    return [[image], [colors[..., :3]], [image, veil]]


def paint_all(e: Explanation) -> list[list[Panel]]:
    """The panels for each of an image's heatmaps, on one scale."""
    peak = max(np.abs(evidence.heatmap).max() for evidence in e.evidence) or 1
    return [paint(e.image, evidence.heatmap / peak, scale_of(e)) for evidence in e.evidence]


def many_sheet(file_name: str, title: str, explanations: list[Explanation]) -> Sheet:
    """Many images: input, heatmap and overlay, or the overlays of two classes; and similar ones."""
    cells = []
    for e in explanations:
        panels, *others = paint_all(e)
        if others:
            panels = [panels[0], panels[2], others[0][2]]
        labels = ["", *map(e.role, e.evidence)]
        caption = f"{e.index}: {e.answer()}".replace(", ", ",\n")
        color = "black" if e.label == e.predicted else "crimson"
        cells += [Cell(panels, caption, labels, color), *e.similar]
    return Sheet(file_name, title, cells, 3)


def overlay_sheet(e: Explanation) -> Sheet:
    """The picture of one image: the input, and heatmap and overlay for each class."""
    cells = []
    for evidence, panels in zip(e.evidence, paint_all(e), strict=True):
        labels = ["input", "heatmap", "overlay"]
        if e.photograph is not None:
            panels, labels = [[e.photograph], *panels], ["photograph", *labels]
        cells.append(Cell(panels, e.caption(evidence), labels))
    cells += e.similar
    return Sheet(e.file_name(), f"{e.name}: {e.answer()}", cells, 1)


def draw_cell(axes: Axes, cell: Cell) -> None:
    """Draw the panels of a cell, its caption and its labels."""
    step = IMAGE_SIZE + 1
    for i, panel in enumerate(cell.panels):
        place = (i * step, i * step + IMAGE_SIZE, IMAGE_SIZE, 0)
        for pixels in panel:
            smooth = "bilinear" if pixels.ndim == 3 else "nearest"
            axes.imshow(pixels, "gray", vmin=0, vmax=255, extent=place, interpolation=smooth)
    axes.set(xlim=(0, len(cell.panels) * step - 1), ylim=(IMAGE_SIZE, 0), yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(cell.caption, color=cell.color)
    axes.set_xticks([(i + 0.5) * step for i in range(len(cell.labels))], cell.labels)
    axes.tick_params(length=0)


@style.context(["default", FONTS])  # not a person's matplotlibrc
def save_sheet(folder: Path, sheet: Sheet, scale: Scale, source: str) -> None:
    """Write a sheet as a PNG file; below it stands the source of the heatmaps."""
    first = sheet.cells[0]
    columns = min(sheet.columns, len(sheet.cells))
    rows = math.ceil(len(sheet.cells) / columns)
    width = 4.3 if sheet.columns > 1 else 3.3 * len(first.panels)  # of a cell, in inches
    lines = 1 + first.caption.count("\n") + bool(first.labels)
    height = width / len(first.panels) + 0.27 * lines
    size = (width * columns + 1.4, height * rows + 0.8 + 0.3 * sheet.title.count("\n"))
    figure = Figure(size, layout="constrained")
    for place, cell in enumerate(sheet.cells, 1):
        draw_cell(figure.add_subplot(rows, columns, place), cell)
    colors = ScalarMappable(Normalize(scale.lowest, 1), scale.color_map)
    bar = figure.colorbar(colors, ax=figure.axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(scale.words)
    figure.suptitle(sheet.title)
    figure.supxlabel(source, color="gray")
    with whole_file(folder / sheet.file_name) as file:
        figure.savefig(file, format="png", dpi=120)
