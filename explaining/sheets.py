"""Heatmaps as pictures: one image enlarged, or many on a sheet."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure

from common.files import whole_file
from dataset import CLASS_NAMES
from explaining.explanation import Explanation

# By whether the heatmap is signed. Equal steps of evidence look equally large; "berlin" goes from
# blue for one class through black to red for the other.
COLOR_MAPS = {False: "inferno", True: "berlin"}
SCALES = {
    False: "share of the evidence (1 = largest)",
    True: "evidence for the class (1), for the other (-1)",
}
OPACITY = 0.9  # of the hottest place, when a heatmap is laid over its image
SCALE = 12  # an image pixel becomes this many picture pixels, both ways
FONT_SIZE = 13  # points: legible even when a sheet of three columns is shrunk to a column of text
Row = tuple[str, list["Cell"]]  # of a sheet: what stands at its left, and its cells
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a file name may be in any script


def on_one_scale(heatmaps: dict) -> dict:
    """Heatmaps from 0 to 1, signed ones from -1, where 1 is the largest share in any of them."""
    peak = max(float(np.abs(heatmap).max()) for heatmap in heatmaps.values()) or 1.0
    return {key: heatmap / peak for key, heatmap in heatmaps.items()}


def power(heatmap: np.ndarray, gamma: float) -> np.ndarray:
    """The absolute values to the power of gamma, with their signs: it lifts what is small."""
    return np.sign(heatmap) * np.abs(heatmap) ** gamma


def colorize(heatmap: np.ndarray, is_signed: bool) -> np.ndarray:
    """The colours of a heatmap (H, W), uint8 RGBA (H, W, 4), more opaque the hotter."""
    place = (heatmap + 1) / 2 if is_signed else heatmap
    opacity = np.abs(heatmap) if is_signed else heatmap**0.5
    colors = colormaps[COLOR_MAPS[is_signed]](place, bytes=True)
    colors[..., 3] = np.rint(255 * OPACITY * opacity)
    return colors


def paint(image: np.ndarray, heatmap: np.ndarray, is_signed: bool = False) -> list[np.ndarray]:
    """An image, uint8 (28, 28), its heatmap, (28, 28), and both, enlarged to RGB by SCALE.

    The heatmap is from 0 to 1, a signed one from -1; one of zeros is labelled "no evidence".
    """
    size = tuple(side * SCALE for side in image.shape[::-1])
    gray = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
    gray = np.repeat(gray[..., None], 3, axis=2)
    heat = cv2.resize(heatmap.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colors = colorize(heat, is_signed)
    colored, opacity = colors[..., :3].copy(), colors[..., 3:] / 255
    overlay = (gray * (1 - opacity) + colored * opacity).astype(np.uint8)
    if not heatmap.any():
        where, font = (SCALE, size[1] // 2), cv2.FONT_HERSHEY_SIMPLEX
        for panel in (colored, overlay):
            for brightness, width in (
                (0, SCALE),
                (255, SCALE // 3),
            ):  # an outline, then the letters
                color = (brightness,) * 3
                cv2.putText(panel, "no evidence", where, font, SCALE / 6.5, color, width)
    return [gray, colored, overlay]


@dataclass
class Cell:
    """One place of a sheet: panels side by side, a caption above, labels below the panels."""

    panels: Sequence[np.ndarray]
    caption: str
    labels: Sequence[str] = ()
    color: str = "black"


def make_cell(e: Explanation, caption: str) -> Cell:
    """An image on a sheet: input, heatmap, overlay; or input and the overlays of two classes."""
    is_signed = e.versus >= 0
    painted = [paint(e.image, heatmap, is_signed) for heatmap in on_one_scale(e.heatmaps).values()]
    panels, labels = painted[0], []
    if is_signed:
        labels = ["", e.role(e.target)]
    elif len(painted) > 1:
        panels = [panels[0], *(overlay for _, _, overlay in painted)]
        labels = ["", *(f"for {CLASS_NAMES[label]}" for label in e.heatmaps)]
    is_wrong = e.label not in (-1, e.predicted)
    return Cell(panels, caption, labels, "crimson" if is_wrong else "black")


def in_rows(cells: list[Cell], columns: int) -> list[Row]:
    """Cells in rows of `columns`, with nothing at the left, for `save_sheet`."""
    return [("", cells[i : i + columns]) for i in range(0, len(cells), columns)]


def save_overlay(e: Explanation, model_name: str, path: Path) -> None:
    """Write the picture of one image: the input, and heatmap and overlay for each class."""
    rows, is_signed = [], e.versus >= 0
    for label, heatmap in on_one_scale(e.heatmaps).items():
        panels, labels = paint(e.image, heatmap, is_signed), ["input", "heatmap", "overlay"]
        if rows:  # the input once is enough
            panels[0], labels[0] = np.full_like(panels[0], 255), ""
        if e.photograph is not None:
            panels, labels = [e.photograph, *panels], ["photograph", *labels]
        caption = ": ".join(filter(None, (e.role(label), e.masked_words(label))))
        rows.append(("", [Cell(panels, caption, labels)]))
    title, width = f"{e.name}: {e.answer()}", 3.3 * len(panels)
    save_sheet(rows, title, SCALES[is_signed], model_name, path, is_signed, width=width)


def draw_cell(axes: Axes, cell: Cell) -> None:
    """Draw the panels of a cell, its caption and its labels."""
    gap = np.full((cell.panels[0].shape[0], SCALE, 3), 255, np.uint8)
    joined = np.hstack([part for panel in cell.panels for part in (gap, panel)][1:])
    axes.imshow(joined, interpolation="nearest")
    axes.set_title(cell.caption, fontsize=FONT_SIZE, color=cell.color, parse_math=False)
    step = joined.shape[1] / len(cell.panels)
    centres = [step * (i + 0.5) for i in range(len(cell.labels))]
    axes.set_xticks(centres, cell.labels, fontsize=FONT_SIZE)
    axes.tick_params(length=0)


@style.context("default")  # whatever the person's matplotlibrc says
def save_sheet(
    rows: list[Row],
    title: str,
    scale: str,
    model_name: str,
    path: Path,
    is_signed: bool = False,
    gamma: float = 1,
    width: float = 4.3,
) -> None:
    """Write rows as a PNG file, `width` inches a column; the colours show `power(share, gamma)`."""
    columns = max(len(row) for _, row in rows)
    panels = max(len(cell.panels) for _, row in rows for cell in row)
    lines = [
        1 + max(cell.caption.count("\n") + any(cell.labels) for cell in row) for _, row in rows
    ]
    heights = [width / panels + 0.27 * n for n in lines]
    size = (width * columns + 1.4, sum(heights) + 0.7 + 0.3 * title.count("\n"))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in all_axes.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for (name, row), row_axes in zip(rows, all_axes, strict=True):
        row_axes[0].set_ylabel(name, fontsize=FONT_SIZE + 1)
        for cell, axes in zip(row, row_axes, strict=False):
            draw_cell(axes, cell)
    there, back = partial(power, gamma=gamma), partial(power, gamma=1 / gamma)
    norm = FuncNorm((there, back), vmin=-is_signed, vmax=1)
    colors = ScalarMappable(norm, COLOR_MAPS[is_signed])
    bar = figure.colorbar(colors, ax=all_axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(scale, fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE + 2, parse_math=False)  # a file name may hold a $
    figure.supxlabel(model_name, fontsize=FONT_SIZE, color="gray", parse_math=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
