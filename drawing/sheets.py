"""Heatmaps as pictures: one image enlarged, or many on a sheet."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps, style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from common.files import whole_file
from dataset import CLASS_NAMES
from drawing.explanation import Explanation

COLOR_MAP = "inferno"  # equal steps of evidence look equally large
SIGNED_COLOR_MAP = "berlin"  # the same, from blue for one class through black to red for the other
SCALE_LABEL = "share of the evidence (1 = largest)"
SIGNED_SCALE_LABEL = "for the class (1), for the other (-1)"
OPACITY = 0.9  # of the hottest place, when a heatmap is laid over its image
SCALE = 12  # an image pixel becomes this many picture pixels, both ways
FONT_SIZE = 13  # points: still legible when a sheet of three columns is shrunk to a column of text
Row = tuple[str, list["Cell"]]  # of a sheet: what stands at its left, and its cells
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a file name may be in any script


def on_one_scale(heatmaps: dict) -> dict:
    """Heatmaps from 0 to 1, signed ones from -1, where 1 is the largest share in any of them."""
    peak = max(float(np.abs(heatmap).max()) for heatmap in heatmaps.values()) or 1.0
    return {key: heatmap / peak for key, heatmap in heatmaps.items()}


def colorize(heatmap: np.ndarray, is_signed: bool) -> np.ndarray:
    """The colours of a heatmap (H, W), 0 to 1, signed ones from -1: uint8 RGBA (H, W, 4), more opaque the hotter."""
    color_map, place = (SIGNED_COLOR_MAP, (heatmap + 1) / 2) if is_signed else (COLOR_MAP, heatmap)
    colors = colormaps[color_map](place, bytes=True)
    colors[..., 3] = np.rint(255 * OPACITY * (np.abs(heatmap) if is_signed else heatmap**0.5))
    return colors


def paint(image: np.ndarray, heatmap: np.ndarray, is_signed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Enlarge an image, uint8 (28, 28), and its heatmap, float (28, 28), and lay one over the other.

    The heatmap is from 0 to 1, a signed one from -1.

    Returns:
        Three uint8 RGB arrays (28 * SCALE, 28 * SCALE, 3): the image, with its pixels sharp; the heatmap in colours;
        and the overlay, which is the more opaque the hotter it is. A heatmap of zeros is labelled "no evidence".
    """
    size = tuple(side * SCALE for side in image.shape[::-1])
    gray = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB)
    heat = cv2.resize(heatmap.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colors = colorize(heat, is_signed)
    colored, opacity = colors[..., :3].copy(), colors[..., 3:] / 255
    overlay = (gray * (1 - opacity) + colored * opacity).astype(np.uint8)
    if not heatmap.any():
        font, font_scale, thin = cv2.FONT_HERSHEY_SIMPLEX, 0.17 * SCALE, SCALE // 3
        for text, y in (("no", 0.45), ("evidence", 0.65)):
            (width, _), _ = cv2.getTextSize(text, font, font_scale, thin)
            where = ((size[0] - width) // 2, int(y * size[1]))
            for panel in (colored, overlay):
                cv2.putText(panel, text, where, font, font_scale, (0, 0, 0), SCALE)  # an outline around the letters
                cv2.putText(panel, text, where, font, font_scale, (255, 255, 255), thin)
    return gray, colored, overlay


@dataclass
class Cell:
    """One place of a sheet: panels side by side, a caption above, labels below the panels."""

    panels: Sequence[np.ndarray]
    caption: str
    labels: Sequence[str] = ()
    color: str = "black"


def make_cell(explanation: Explanation, caption: str) -> Cell:
    """An image on a sheet: input, heatmap, overlay; or input and the overlays of two classes where they differ."""
    heatmaps, is_signed = on_one_scale(explanation.heatmaps), explanation.versus >= 0
    panels, *others = [paint(explanation.image, heatmap, is_signed) for heatmap in heatmaps.values()]
    labels = ["", explanation.role(explanation.target)] if is_signed else []
    if others:
        panels = [panels[0], panels[2], others[0][2]]
        labels = ["", *(f"for {CLASS_NAMES[label]}" for label in heatmaps)]
    return Cell(panels, caption, labels, "black" if explanation.label in (-1, explanation.predicted) else "crimson")


def in_rows(cells: list[Cell], columns: int) -> list[Row]:
    """Cells in rows of `columns`, with nothing at the left, for `save_sheet`."""
    return [("", cells[i : i + columns]) for i in range(0, len(cells), columns)]


def save_overlay(e: Explanation, model_name: str, path: Path) -> None:
    """Write the picture of one image: the input, and a row of heatmap and overlay for each explained class."""
    rows, is_signed = [], e.versus >= 0
    for label, heatmap in on_one_scale(e.heatmaps).items():
        gray, colored, overlay = paint(e.image, heatmap, is_signed)
        panels = [np.full_like(gray, 255) if rows else gray, colored, overlay]  # the input once is enough
        names = ["" if rows else "input", "heatmap", "overlay"]
        if e.photograph is not None:
            panels.insert(0, np.asarray(ImageOps.pad(Image.fromarray(e.photograph), gray.shape[:2], color="white")))
            names.insert(0, "photograph")
        rows.append(("", [Cell(panels, ": ".join(filter(None, (e.role(label), e.trust(label)))), names)]))
    scale = f"for {CLASS_NAMES[e.versus]} (-1), for {CLASS_NAMES[e.target]} (1)" if is_signed else SCALE_LABEL
    save_sheet(rows, f"{e.name}: {e.answer()}", scale, model_name, path, is_signed, width=3.3 * len(panels))


def power(heatmap: np.ndarray, gamma: float) -> np.ndarray:
    """The absolute values to the power of gamma, with their signs: it lifts what is small."""
    return np.sign(heatmap) * np.abs(heatmap) ** gamma


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
    """Write a PNG file of rows, `width` inches a column; the colours of the heatmaps are of `power(share, gamma)`."""
    columns = max(len(row) for _, row in rows)
    panels = max(len(cell.panels) for _, row in rows for cell in row)
    lines = [1 + max(cell.caption.count("\n") + any(cell.labels) for cell in row) for _, row in rows]
    heights = [width / panels + 0.27 * n for n in lines]
    size = (width * columns + 1.4, sum(heights) + 0.7 + 0.3 * title.count("\n"))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for (name, row), row_axes in zip(rows, all_axes, strict=True):
        for axes in row_axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, fontsize=FONT_SIZE + 1)
        for axes, cell in zip(row_axes, row, strict=False):
            gap = np.full((cell.panels[0].shape[0], SCALE, 3), 255, np.uint8)
            joined = np.hstack([part for panel in cell.panels for part in (gap, panel)][1:])
            axes.imshow(joined, interpolation="nearest")
            axes.set_title(cell.caption, fontsize=FONT_SIZE, color=cell.color, parse_math=False)
            if any(cell.labels):
                step = joined.shape[1] / len(cell.panels)
                axes.set_xticks([step * (i + 0.5) for i in range(len(cell.labels))], cell.labels, fontsize=FONT_SIZE)
                axes.tick_params(length=0)
    norm = FuncNorm((partial(power, gamma=gamma), partial(power, gamma=1 / gamma)), vmin=-is_signed, vmax=1)
    colors = ScalarMappable(norm, SIGNED_COLOR_MAP if is_signed else COLOR_MAP)
    bar = figure.colorbar(colors, ax=all_axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(scale, fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE + 2, parse_math=False)  # a file name may hold a $
    figure.supxlabel(model_name, fontsize=FONT_SIZE, color="gray", parse_math=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
