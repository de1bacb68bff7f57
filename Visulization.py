"""Paint heatmaps: which places of an image a trained model's decision rests on.

    python Visulization.py                                    some test images of each class, with the shipped model
    python Visulization.py --classes Shirt Coat --only-errors
    python Visulization.py --worst 24                         the test images it is most confidently wrong about
    python Visulization.py --average                          what it looks at in each class, over the whole test split
    python Visulization.py --index 1917 --compare-layers      one test image, seen from every layer
    python Visulization.py --image shoe.jpg "my shirt.png"    your own pictures
    python Visulization.py --html --save-arrays               a gallery to click through, the raw maps as arrays, too
    python Visulization.py --checkpoint checkpoints/best.pt   the model that you trained

Writes into HeapImg/ one picture per image, and a contact sheet with a row per class.
"""

import argparse
import base64
import html
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import cv2
except ImportError as error:  # libGL.so.1, which opencv-python needs, is missing on most servers
    raise SystemExit(
        f"Visulization.py: error: OpenCV cannot be loaded ({error}); without a desktop use the headless build: "
        f"pip uninstall -y opencv-python && pip install opencv-python-headless"
    ) from None

import dataset
from gradcam import METHODS, GradCAM
from model import CheckpointError, HybridClassifier, load_checkpoint
from training.processes import set_threads

SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "shipped" / "model.pt"
METHOD = "layercam"
COLOR_MAP = "inferno"  # equal steps of evidence look equally large
SCALE = 12  # an image pixel becomes so many picture pixels, both ways
OPACITY = 0.9  # of the hottest place, when a heatmap is laid over its image
SHEET_COLUMNS = 3  # on sheets without a row per class
COLUMN_WIDTH = 4.3  # inches
PANELS = ("input", "heatmap", "overlay")
LEAST_EVIDENCE = 1e-3  # logits: less of it in a whole map is rounding, not evidence
RANGES = dict(index=(0, 9_999), worst=(1, 200), num_images=(1, 50), seed=(0, 2**32 - 1))  # of flags
FONT_SIZE = 13  # points: still legible when a sheet of three columns is shrunk to a column of text
MAX_IMAGE_PIXELS = 64_000_000  # of a person's own picture
MAX_IMAGE_BYTES = 256 << 20
# Not all that Pillow reads: it hands PostScript, which is a program, to Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


# ---------------------------------------------------------------------------------------------------------------------
# A person's own pictures


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture of any size and colour and bring it to the form of the data set's images.

    Follows the pipeline of the data set's paper (Xiao et al. 2017, section 2): grey, the background cut away on all
    sides, the longest side scaled to 28 pixels, centred on a dark background. Whether the picture itself has a light or
    a dark background is read off its border; transparent places count as background.

    Returns:
        uint8 array of shape (28, 28).

    Raises:
        ValueError: the file is missing, no picture, damaged, too large, or of one even colour.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ValueError("is not a file: name a picture")
    if Path(path).stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"is larger than {MAX_IMAGE_BYTES >> 20} MiB: scale it down first")
    try:
        # Without Pillow's remarks on a file that it reads all the same.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGE_FORMATS) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            picture.load()
            with suppress(Exception):  # a damaged note on how the camera was held is no reason to give up
                picture = ImageOps.exif_transpose(picture)
            is_deep = picture.mode.startswith(("I", "F"))  # 16 bits or more, which convert("RGBA") would clip
            if is_deep:
                picture = picture.convert("I") if picture.mode.startswith("I;") else picture
                highest = np.max(picture.getextrema())
                top = next(top for top in (1, 255, 65535, np.inf) if not highest > top)
            picture = picture.convert("F" if is_deep else "RGBA")
            picture.thumbnail((1024, 1024), Image.Resampling.BOX)  # far more than is left of it in the end
            if is_deep:
                gray = np.asarray(picture)
                alpha = np.ones_like(gray)
            else:
                gray, alpha = np.moveaxis(np.asarray(picture.convert("LA"), np.float32), 2, 0)
                alpha, top = alpha / 255, 255
    except UnidentifiedImageError:
        raise ValueError(f"is no picture of a known format: give one of {', '.join(IMAGE_FORMATS)}") from None
    except (Image.DecompressionBombError, MemoryError):
        raise ValueError(f"has more than {MAX_IMAGE_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # a damaged picture ends in one of many types, SyntaxError and struct.error among them
        reason = getattr(error, "strerror", None) or str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"is damaged ({reason if isinstance(reason, str) else reason[0]}): use another copy") from None
    if not alpha.any():
        raise ValueError("is transparent all over, there is nothing to classify: use another picture")

    gray = np.clip(np.nan_to_num(gray) / top, 0, 1)
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    border_alpha = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    if np.median(border_alpha) > 0.5:
        background = float(np.median(border[border_alpha > 0.5]))
    else:  # cut out: as the data set's garments were, photographed on white, unless it would vanish there
        background = 0.0 if (gray * alpha).sum() > 0.8 * alpha.sum() else 1.0
    # The garment may be lighter or darker than its background: what it mostly is becomes light on dark.
    contrast = (gray - background) * alpha
    if np.abs(contrast).max() < 0.02:
        raise ValueError("is of one even colour, there is nothing to classify: use another picture")
    foreground = contrast / (1 - background) if contrast.sum() > 0 else -contrast / background
    foreground = np.clip(foreground, 0, 1)
    inside = foreground > 0.05 * foreground.max()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    garment = foreground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    size = dataset.IMAGE_SIZE
    scale = size / max(garment.shape)
    height, width = (max(1, round(side * scale)) for side in garment.shape)
    garment = cv2.resize(garment, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    image = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    image[top : top + height, left : left + width] = garment
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Explaining


@dataclass
class Explanation:
    """An image, the model's answer, and where the evidence for a class lies.

    Attributes:
        name: "test image 1917", or the file name of a person's own picture.
        index: in the test split; -1 for a person's own picture.
        image: uint8 array (28, 28).
        label: the true class; -1 where it is not known.
        probabilities: of the classes, float array (10,).
        target: the class that `heatmap` is for.
        heatmap: float array (28, 28), in logits per pixel.
        true_heatmap: the same for the true class, where that is known and another one than `target`.
    """

    name: str
    index: int
    image: np.ndarray
    label: int
    probabilities: np.ndarray
    target: int
    heatmap: np.ndarray
    true_heatmap: np.ndarray | None

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    def maps(self) -> dict[int, np.ndarray]:
        """The heatmap of each explained class, from 0 to 1 on one scale."""
        maps = {self.target: self.heatmap}
        if self.true_heatmap is not None:
            maps[self.label] = self.true_heatmap
        return on_one_scale(maps)

    def answer(self) -> str:
        """The line that says what the image is and what the model takes it for."""
        p, names = self.probabilities, dataset.CLASS_NAMES
        predicted = f"predicted {names[self.predicted]} {p[self.predicted]:.0%}"
        if self.label < 0:
            return predicted
        true = f"true {names[self.label]}" + ("" if self.label == self.predicted else f" {p[self.label]:.0%}")
        return f"{true}, {predicted}"

    def role(self, label: int) -> str:
        """A class's name, and what it is to this image."""
        is_roles = {"predicted": label == self.predicted, "true": label == self.label}
        roles = " and ".join(role for role, is_role in is_roles.items() if is_role)
        return f"for {dataset.CLASS_NAMES[label]}" + (f" ({roles})" if roles else "")


def shares(heatmap: np.ndarray) -> np.ndarray:
    """Each place's share of the whole evidence: a heatmap that adds up to 1, or zeros where there is next to none.

    Two classes' evidence differs in size for a reason that is no explanation: a class that has won already has less to
    gain from any place than one that has not. What compares is where it lies.
    """
    total = heatmap.sum()
    return heatmap / total if total >= LEAST_EVIDENCE else np.zeros_like(heatmap)


def on_one_scale(maps: dict) -> dict:
    """Heatmaps of shares, from 0 to 1, where 1 is the largest share in any of them."""
    maps = {key: shares(heatmap) for key, heatmap in maps.items()}
    peak = max(float(heatmap.max()) for heatmap in maps.values()) or 1.0
    return {key: heatmap / peak for key, heatmap in maps.items()}


def default_layers(model: HybridClassifier) -> list[str]:
    """The layers whose heatmaps are most faithful (benchmarks/faithfulness.py): the stem's ends at 28x28 and 14x14."""
    return model.stage_ends()[:2]


def all_layers(model: HybridClassifier) -> dict[str, int]:
    """The layers from the first convolution to the last block: name, and how many places their grid has each way."""
    layers, side = {}, dataset.IMAGE_SIZE
    for name, _ in model.stem.named_children():
        side //= 2 if name.startswith("down") else 1
        layers[f"stem.{name}"] = side
    return layers | {f"blocks.{i}": side for i in range(len(model.blocks))}


def heatmaps(
    model: HybridClassifier, layers: list[str], method: str, images: torch.Tensor, targets: torch.Tensor
) -> np.ndarray:
    """Heatmaps (N, 28, 28), in logits per pixel, of uint8 images (N, 1, 28, 28) for one class each, int64 (N,)."""
    chunks = zip(images.split(500), targets.split(500), strict=True)
    with GradCAM(model, layers, method) as cam:
        maps = [cam(dataset.normalize(chunk), target, normalize=False) for chunk, target in chunks]
    return torch.cat(maps).numpy()


@torch.no_grad()
def classify(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities (N, 10) of uint8 images (N, 1, 28, 28).

    Raises:
        CheckpointError: the model's answer is no number.
    """
    probabilities = torch.cat([model(dataset.normalize(chunk)).softmax(dim=1) for chunk in images.split(500)])
    if not probabilities.isfinite().all():
        raise CheckpointError("the model's answer is not finite: train again, or use another checkpoint")
    return probabilities


def explain(
    args: argparse.Namespace,
    model: HybridClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    names: list[str],
    indices: list[int],
    targets: torch.Tensor | None = None,
) -> list[Explanation]:
    """Explain uint8 images (N, 1, 28, 28), for `targets` or else `args.target_class` or else the predicted class."""
    probabilities = classify(model, images)
    if targets is None:
        predicted = probabilities.argmax(dim=1)
        targets = predicted if args.target_class is None else torch.full_like(predicted, args.target_class)
    maps = heatmaps(model, args.target_layer, args.method, images, targets)
    true_maps: dict[int, np.ndarray] = {}
    differs = ((labels >= 0) & (labels != targets)).nonzero().flatten()
    if len(differs):
        found = heatmaps(model, args.target_layer, args.method, images[differs], labels[differs])
        true_maps = dict(zip(differs.tolist(), found, strict=True))
    return [
        Explanation(
            name,
            index,
            images[i, 0].numpy(),
            int(labels[i]),
            probabilities[i].numpy(),
            int(targets[i]),
            maps[i],
            true_maps.get(i),
        )
        for i, (name, index) in enumerate(zip(names, indices, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Painting


def paint(image: np.ndarray, heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Enlarge an image and its heatmap, and lay one over the other.

    Args:
        image: uint8 array (28, 28).
        heatmap: float array (28, 28), 0 to 1; one of zeros is labelled "no evidence".

    Returns:
        Three uint8 RGB arrays (28 * SCALE, 28 * SCALE, 3): the image, with its pixels sharp; the heatmap in colours;
        and the image under the heatmap, which is the more opaque the hotter it is.
    """
    size = tuple(side * SCALE for side in image.shape[::-1])
    gray = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB)
    heat = cv2.resize(heatmap.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colored = (colormaps[COLOR_MAP](heat)[..., :3] * 255).astype(np.uint8)
    opacity = OPACITY * heat[..., None] ** 0.5
    overlay = (gray * (1 - opacity) + colored * opacity).astype(np.uint8)
    if not heatmap.any():
        for panel in (colored, overlay):
            for text, y in (("no", 0.45), ("evidence", 0.65)):
                (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.17 * SCALE, SCALE // 3)
                where = ((size[0] - width) // 2, int(y * size[1]))
                for color, thickness in (((0, 0, 0), SCALE), ((255, 255, 255), SCALE // 3)):
                    cv2.putText(panel, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.17 * SCALE, color, thickness)
    return gray, colored, overlay


def side_by_side(panels: list[np.ndarray]) -> np.ndarray:
    """Join uint8 RGB arrays of the same height to one, with a white gap between them."""
    gap = np.full((panels[0].shape[0], SCALE, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (gap, panel)][1:])


def colorbar(figure: Figure, axes: object, label: str, gamma: float = 1) -> None:
    """Add the scale of the heatmaps to a figure; their colours are of share ** gamma."""
    scale = ScalarMappable(PowerNorm(gamma, vmin=0, vmax=1), COLOR_MAP)
    bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(label, fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG file."""
    with warnings.catch_warnings(), dataset.whole_file(path) as file:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a file name may be in any script
        figure.savefig(file, format="png", dpi=dpi)


def save_overlay(explanation: Explanation, path: Path) -> None:
    """Write the picture of one image: the input, and a row of heatmap and overlay for each explained class."""
    maps = explanation.maps()
    figure = Figure(figsize=(11.2, 3.6 * len(maps) + 0.5), layout="constrained")
    all_axes = figure.subplots(len(maps), 3, squeeze=False)
    for row, (axes_of_row, (label, heatmap)) in enumerate(zip(all_axes, maps.items(), strict=True)):
        for axes, panel, name in zip(axes_of_row, paint(explanation.image, heatmap), PANELS, strict=True):
            axes.axis("off")
            if row and name == "input":  # it is above
                continue
            axes.imshow(panel, interpolation="nearest")
            axes.set_title(name if name == "input" else f"{name} {explanation.role(label)}", fontsize=FONT_SIZE)
    colorbar(figure, all_axes, "share of the evidence (1 = largest)")
    title = f"{explanation.name}: {explanation.answer()}"
    figure.suptitle(title, fontsize=FONT_SIZE + 1, parse_math=False)  # a file name may hold a $
    save_figure(figure, path, dpi=100)


@dataclass
class Cell:
    """One place of a sheet: panels side by side, a caption above, labels below the panels; red where it is an error."""

    panels: list[np.ndarray]
    caption: str
    labels: Sequence[str] = ()
    is_error: bool = False


def save_sheet(rows: list[tuple[str, list[Cell]]], title: str, scale: str, path: Path, gamma: float = 1) -> None:
    """Write cells on one sheet.

    Args:
        rows: what stands at the left of a row, and its cells.
        title: the lines above the sheet.
        scale: what the colour bar is labelled with.
        path: the PNG file.
        gamma: the heatmaps' colours are of share ** gamma.
    """
    columns = max(len(row) for _, row in rows)
    panels = max(len(cell.panels) for _, row in rows for cell in row)
    lines = [1 + max(cell.caption.count("\n") + any(cell.labels) for cell in row) for _, row in rows]
    heights = [COLUMN_WIDTH / panels + 0.27 * n for n in lines]
    size = (COLUMN_WIDTH * columns + 1.4, sum(heights) + 0.4 + 0.3 * title.count("\n"))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for (name, row), row_axes in zip(rows, all_axes, strict=True):
        for axes in row_axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, fontsize=FONT_SIZE + 1)
        for axes, cell in zip(row_axes, row, strict=False):
            joined = side_by_side(cell.panels)
            axes.imshow(joined, interpolation="nearest")
            color = "crimson" if cell.is_error else "black"
            axes.set_title(cell.caption, fontsize=FONT_SIZE, color=color, parse_math=False)
            step = joined.shape[1] / len(cell.panels)
            if any(cell.labels):
                axes.set_xticks([step * (i + 0.5) for i in range(len(cell.panels))], cell.labels, fontsize=FONT_SIZE)
                axes.tick_params(length=0)
    colorbar(figure, all_axes, scale, gamma)
    figure.suptitle(title, fontsize=FONT_SIZE + 2, parse_math=False)
    save_figure(figure, path, dpi=120)


def cell_of(explanation: Explanation, caption: str) -> Cell:
    """An image on a sheet: input, heatmap, overlay; or input and the overlays of two classes where they differ."""
    is_error = explanation.label not in (-1, explanation.predicted)
    painted = {label: paint(explanation.image, heatmap) for label, heatmap in explanation.maps().items()}
    gray, heatmap, overlay = painted[explanation.target]
    if len(painted) == 1:
        return Cell([gray, heatmap, overlay], caption, is_error=is_error)
    labels = ["", *(f"for {dataset.CLASS_NAMES[label]}" for label in painted)]
    return Cell([gray, *(overlay for _, _, overlay in painted.values())], caption, labels, is_error)


def in_rows(cells: list[Cell], columns: int = SHEET_COLUMNS) -> list[tuple[str, list[Cell]]]:
    """Cells in rows of `columns`, with nothing at the left."""
    return [("", cells[i : i + columns]) for i in range(0, len(cells), columns)]


# ---------------------------------------------------------------------------------------------------------------------
# For those who analyse, and for those who browse


def save_arrays(args: argparse.Namespace, explanations: list[Explanation], path: Path) -> None:
    """Write everything as an `.npz` archive, which `numpy.load` reads without pickle.

    For N images: `names`, `indices` (in the test split, else -1), `images` uint8 (N, 28, 28), `labels` (-1: not known),
    `predictions`, `probabilities` (N, 10), `target_classes`, `maps` float32 (N, 28, 28) for these classes, in logits
    per pixel, and `true_maps`, the same for the labels (zeros where these are not known). For all of them:
    `class_names`, `target_layers` and `method`.
    """
    every = explanations
    true_maps = [e.heatmap if e.target == e.label else e.true_heatmap for e in every]
    true_maps = [np.zeros_like(every[0].heatmap) if heatmap is None else heatmap for heatmap in true_maps]
    arrays = dict(
        names=np.array([e.name for e in every]),
        indices=np.array([e.index for e in every]),
        images=np.stack([e.image for e in every]),
        labels=np.array([e.label for e in every]),
        predictions=np.array([e.predicted for e in every]),
        probabilities=np.stack([e.probabilities for e in every]),
        target_classes=np.array([e.target for e in every]),
        maps=np.stack([e.heatmap for e in every]),
        true_maps=np.stack(true_maps),
        class_names=np.array(dataset.CLASS_NAMES),
        target_layers=np.array(args.target_layer),
        method=np.array(args.method),
    )
    with dataset.whole_file(path) as file:
        np.savez_compressed(file, **arrays)


GALLERY = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Heatmaps of $checkpoint</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
  body { max-width: 76rem; margin: 0 auto; padding: 0 1rem 3rem; }
  form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center;
    padding: .75rem 0; background: Canvas; border-bottom: 1px solid #8888; }
  select, input { font: inherit; margin-left: .4rem; vertical-align: middle; }
  output { font-weight: 600; }
  main { display: flex; flex-wrap: wrap; gap: 1.25rem; padding-top: 1.25rem; }
  figure { margin: 0; padding: .75rem; border: 1px solid #8888; border-radius: .5rem; }
  figure[data-result=wrong] { border-color: crimson; }
  figure[hidden] { display: none; }
  figcaption { max-width: 22rem; }
  .panels { display: flex; gap: .5rem; }
  .panels > div { width: 168px; font-size: .875rem; }
  .picture { position: relative; height: 168px; margin-bottom: .25rem; }
  .picture > * { position: absolute; inset: 0; width: 100%; height: 100%; }
  .input { image-rendering: pixelated; }
  .none { display: grid; place-items: center; color: white; text-shadow: 0 0 4px black, 0 0 4px black; }
  .scale { display: inline-block; width: 10rem; height: .9rem; margin: 0 .4rem; vertical-align: middle;
    background: linear-gradient(to right, $colors); }
</style>
</head>
<body>
<h1>What the model looks at</h1>
<p>$count images, $checkpoint, $method heatmaps of $layers. Share of the evidence for a class, relative to the largest
in the image: 0 <span class="scale"></span> 1</p>
<form autocomplete="off">
<label>true class<select id="true"><option value="">all</option>$true_options</select></label>
<label>predicted class<select id="predicted"><option value="">all</option>$predicted_options</select></label>
<label>result<select id="result"><option value="">all</option>
<option value="right">right</option><option value="wrong">wrong</option></select></label>
<label>heatmap<input id="opacity" type="range" min="0" max="1" step="0.05" value="1"></label>
<output id="shown">$count of $count images</output>
</form>
<main>
$figures
</main>
<script>
  const filters = ["true", "predicted", "result"].map(id => document.getElementById(id));
  const figures = [...document.querySelectorAll("figure")];
  function filter() {
    let shown = 0;
    for (const figure of figures) {
      figure.hidden = filters.some(select => select.value && select.value !== figure.dataset[select.id]);
      shown += !figure.hidden;
    }
    document.getElementById("shown").textContent = shown + " of " + figures.length + " images";
  }
  for (const select of filters) select.addEventListener("change", filter);
  document.getElementById("opacity").addEventListener("input", event => {
    for (const heat of document.querySelectorAll(".heat")) heat.style.opacity = event.target.value;
  });
</script>
</body>
</html>
""")


def data_url(pixels: np.ndarray) -> str:
    """A uint8 array, grey (H, W) or RGBA (H, W, 4), as a PNG inside an HTML attribute."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA)
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", pixels)[1]).decode()


def save_gallery(args: argparse.Namespace, explanations: list[Explanation], path: Path) -> None:
    """Write a page that shows the images and filters them by class and result; it needs no server and no other file."""
    figures = []
    for e in explanations:
        panels = []
        for label, heatmap in e.maps().items():
            heat = (colormaps[COLOR_MAP](heatmap) * 255).astype(np.uint8)
            heat[..., 3] = (OPACITY * heatmap**0.5 * 255).round()
            what = html.escape(e.role(label))
            none = "" if heatmap.any() else '<span class="none">no evidence</span>'
            panels.append(
                f'<div><div class="picture"><img class="input" src="{data_url(e.image)}" alt="{html.escape(e.name)}">'
                f'<img class="heat" src="{data_url(heat)}" alt="heatmap {what}">{none}</div>{what}</div>'
            )
        true = dataset.CLASS_NAMES[e.label] if e.label >= 0 else ""
        result = "" if e.label < 0 else "right" if e.label == e.predicted else "wrong"
        figures.append(
            f'<figure data-true="{true}" data-predicted="{dataset.CLASS_NAMES[e.predicted]}" data-result="{result}">'
            f'<div class="panels">{"".join(panels)}</div>'
            f"<figcaption>{html.escape(e.name)}: {e.answer()}</figcaption></figure>"
        )

    def options(labels: set[int]) -> str:
        return "".join(f"<option>{dataset.CLASS_NAMES[label]}</option>" for label in sorted(labels - {-1}))

    page = GALLERY.substitute(
        checkpoint=html.escape("/".join(args.checkpoint.absolute().parts[-2:])),
        count=len(explanations),
        method=args.method,
        layers=html.escape(" + ".join(args.target_layer)),
        colors=", ".join("rgb({:.0%} {:.0%} {:.0%})".format(*colormaps[COLOR_MAP](i / 8)[:3]) for i in range(9)),
        true_options=options({e.label for e in explanations}),
        predicted_options=options({e.predicted for e in explanations}),
        figures="\n".join(figures),
    )
    with dataset.whole_file(path) as file:
        file.write(page.encode())


def save_extras(args: argparse.Namespace, explanations: list[Explanation]) -> None:
    """Write what `--save-arrays` and `--html` ask for."""
    if args.save_arrays:
        save_arrays(args, explanations, args.output_dir / "heatmaps.npz")
        print(f"wrote heatmaps.npz to {args.output_dir}")
    if args.html:
        save_gallery(args, explanations, args.output_dir / "index.html")
        print(f"wrote index.html to {args.output_dir}: open it in a browser")


# ---------------------------------------------------------------------------------------------------------------------
# The things the script does


def slug(name: str) -> str:
    """A class name as part of a file name: "T-shirt/top" becomes "T-shirt-top"."""
    return name.replace("/", "-").replace(" ", "-")


def find_errors(args: argparse.Namespace, model: HybridClassifier) -> torch.Tensor:
    """The numbers of the test images of `args.classes` that the model gets wrong, the most confident first."""
    images, labels = dataset.load(args.data_dir, train=False)
    confidence, predicted = classify(model, images).max(dim=1)
    wrong = torch.isin(labels, torch.tensor(args.classes)) & (predicted != labels)
    order = torch.where(wrong, confidence, -1).argsort(descending=True, stable=True)[: int(wrong.sum())]
    if not len(order):
        raise ValueError("the model makes no error in these classes: name others with --classes")
    return order


def explain_test_images(args: argparse.Namespace, model: HybridClassifier, index: torch.Tensor) -> list[Explanation]:
    """Explain the test images with these numbers."""
    images, labels = dataset.load(args.data_dir, train=False)
    names = [f"test image {i}" for i in index.tolist()]
    return explain(args, model, images[index], labels[index], names, index.tolist())


def choose_test_images(args: argparse.Namespace, model: HybridClassifier, number: int) -> torch.Tensor:
    """The numbers of the test images that the flags ask for: those of `--index`, or `number` of each class."""
    labels = dataset.load(args.data_dir, train=False)[1]
    if args.index:
        return torch.tensor(args.index)
    generator = torch.Generator().manual_seed(args.seed)
    candidates = find_errors(args, model).sort().values if args.only_errors else torch.arange(len(labels))
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    return torch.cat([candidates[labels[candidates] == label][:number].sort().values for label in args.classes])


def paint_test_images(args: argparse.Namespace, model: HybridClassifier) -> None:
    """A picture of each chosen test image, and a sheet with a row per class."""
    explanations = explain_test_images(args, model, choose_test_images(args, model, args.num_images))
    rows: dict[str, list[Cell]] = {dataset.CLASS_NAMES[label]: [] for label in args.classes}
    for e in explanations:
        true, predicted = dataset.CLASS_NAMES[e.label], dataset.CLASS_NAMES[e.predicted]
        save_overlay(e, args.output_dir / f"{e.index:05d}_{slug(true)}_as_{slug(predicted)}.png")
        rows.setdefault(true, []).append(cell_of(e, e.answer()))
    title = (
        f"{args.method} of {' + '.join(args.target_layer)}, test images: input, heatmap, overlay\n"
        f"where the true class is another: input, overlay for the one, overlay for the other"
    )
    scale = "share of the evidence (1 = largest in the image)"
    save_sheet([row for row in rows.items() if row[1]], title, scale, args.output_dir / "contact_sheet.png")
    print(f"wrote {len(explanations)} overlays and contact_sheet.png to {args.output_dir}")
    save_extras(args, explanations)


def paint_worst(args: argparse.Namespace, model: HybridClassifier) -> None:
    """The most confident errors on one sheet."""
    errors = find_errors(args, model)
    explanations = explain_test_images(args, model, errors[: args.worst])
    cells = [cell_of(e, f"{e.index}: {e.answer()}".replace(", ", ",\n")) for e in explanations]
    title = f"the {len(cells)} most confident of {len(errors)} errors on test images: input, overlays for both classes"
    scale = "share of the evidence (1 = largest in the image)"
    save_sheet(in_rows(cells), title, scale, args.output_dir / "worst.png")
    print(f"wrote worst.png to {args.output_dir}: {len(cells)} of {len(errors)} errors")
    save_extras(args, explanations)


def paint_average(args: argparse.Namespace, model: HybridClassifier) -> None:
    """Each class's mean heatmap, for that class, over its mean image: the whole test split on one scale."""
    images, labels = dataset.load(args.data_dir, train=False)
    index = torch.isin(labels, torch.tensor(args.classes)).nonzero().flatten().tolist()
    images, labels = images[index], labels[index]
    names = [f"test image {i}" for i in index]
    explanations = explain(args, model, images, labels, names, index, targets=labels)
    members = {label: [e for e in explanations if e.label == label] for label in args.classes}
    maps = on_one_scale({k: np.mean([shares(e.heatmap) for e in group], axis=0) for k, group in members.items()})
    cells = []
    for label, group in members.items():
        mean_image = np.mean([e.image for e in group], axis=0).round().astype(np.uint8)
        share = np.mean([e.predicted == label for e in group])
        caption = f"{dataset.CLASS_NAMES[label]}: {len(group):,} images, {share:.0%} right"
        cells.append(Cell(list(paint(mean_image, maps[label])), caption))
    layers = " + ".join(args.target_layer)
    title = f"{args.method} of {layers}, test images by their class:\nmean image, mean heatmap for the class, overlay"
    save_sheet(
        in_rows(cells, 2), title, "mean share of the evidence (1 = largest of all)", args.output_dir / "average.png"
    )
    print(f"wrote average.png to {args.output_dir}: {len(explanations):,} test images")
    save_extras(args, explanations)


def paint_layers(args: argparse.Namespace, model: HybridClassifier, e: Explanation, name: str) -> None:
    """One image seen from every layer, on one scale; the layers of the other pictures first."""
    image, target = torch.from_numpy(e.image)[None, None], torch.tensor([e.target])
    maps = {" + ".join(args.target_layer): e.heatmap}
    for layer, side in all_layers(model).items():
        (maps[f"{layer}, {side}x{side}"],) = heatmaps(model, [layer], args.method, image, target)
    gamma = 0.5  # a coarse layer's strongest place holds many times the share of a fine one's
    maps = {caption: heatmap**gamma for caption, heatmap in on_one_scale(maps).items()}
    cells = [Cell(list(paint(e.image, heatmap)[1:]), caption) for caption, heatmap in maps.items()]
    title = f"{e.name}: {e.answer()}\n{args.method} {e.role(e.target)}: heatmap, overlay"
    scale = "share of the evidence (1 = largest in any layer), square root scale"
    save_sheet(in_rows(cells), title, scale, args.output_dir / name, gamma)
    print(f"wrote {name} to {args.output_dir}")


def printable(path: str | Path) -> str:
    """A file's name as it can be shown: what is no character, or would begin a new line, is replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(path))


def paint_own_images(args: argparse.Namespace, model: HybridClassifier) -> int:
    """Paint the pictures in `args.image`, print their three likeliest classes, and return how many failed."""
    failures, written, explanations = 0, set(), []
    for path in args.image:
        try:
            image = torch.from_numpy(read_image(path))[None, None]
            (e,) = explain(args, model, image, torch.tensor([-1]), [printable(Path(path).name)], [-1])
            ending = "layers" if args.compare_layers else f"as_{slug(dataset.CLASS_NAMES[e.predicted])}"
            stem = os.fsencode(Path(path).stem)[:200].decode(errors="ignore")  # a file's name has 255 bytes at most
            stem = f"{stem}_{ending}"
            name = next(n for n in (f"{stem}.png", *(f"{stem}_{k}.png" for k in range(2, 10_000))) if n not in written)
            if args.compare_layers:
                paint_layers(args, model, e, name)
            else:
                save_overlay(e, args.output_dir / name)
        except (ValueError, OSError) as error:
            print(f"{printable(path)}: {dataset.one_line(error)}", file=sys.stderr)
            failures += 1
            continue
        written.add(name)
        explanations.append(e)
        top = e.probabilities.argsort()[::-1][:3]
        print(f"{printable(path)}: " + ", ".join(f"{dataset.CLASS_NAMES[c]} {e.probabilities[c]:.1%}" for c in top))
    if written and not args.compare_layers:
        print(f"wrote {len(written)} overlays to {args.output_dir}")
        save_extras(args, explanations)
    return failures


def class_index(text: str) -> int:
    """A class from its name, in any case, or its number; for argparse."""
    names = [name.lower() for name in dataset.CLASS_NAMES]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(dataset.CLASS_NAMES)}, or 0 to {len(names) - 1}")


def whole_number(name: str) -> Callable[[str], int]:
    """A parser of a whole number within its range, for argparse."""
    low, high = RANGES[name]

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return int(text)

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may have letters that this terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without half a page of usage
    classes = range(len(dataset.CLASS_NAMES))
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT, help="of train.py (default: the shipped one)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--image", nargs="+", metavar="FILE", help="explain these pictures instead of test images")
    what.add_argument("--index", type=whole_number("index"), nargs="+", metavar="N", help="explain these test images")
    what.add_argument(
        "--worst", type=whole_number("worst"), metavar="N", help="one sheet of the N most confident errors"
    )
    what.add_argument(
        "--average", action="store_true", help="one sheet of each class's mean heatmap over the test split"
    )
    add(
        "--num-images",
        type=whole_number("num_images"),
        default=3,
        metavar="N",
        help="images of each class (default: 3)",
    )
    add(
        "--classes",
        type=class_index,
        nargs="+",
        default=[*classes],
        metavar="CLASS",
        help="by name or number (default: all)",
    )
    add("--only-errors", action="store_true", help="only test images that the model gets wrong")
    add("--seed", type=whole_number("seed"), default=0, metavar="N", help="which test images (default: 0)")
    add("--method", choices=METHODS, default=METHOD, help=f"how the map is computed (default: {METHOD})")
    add(
        "--target-layer",
        nargs="+",
        metavar="NAME",
        help="layer to look at, or several to average (default: the ends of the stem at 28x28 and at 14x14)",
    )
    add("--target-class", type=class_index, metavar="CLASS", help="class to explain (default: the predicted one)")
    add(
        "--compare-layers", action="store_true", help="one image (--index, --image) seen from every layer, on one sheet"
    )
    add("--save-arrays", action="store_true", help="also write heatmaps.npz: maps, labels, predictions, probabilities")
    add("--html", action="store_true", help="also write index.html, a gallery that is filtered by class and result")
    add("--data-dir", default="data", metavar="PATH", help="folder of Fashion-MNIST (default: data)")
    add("--output-dir", type=Path, default=Path("HeapImg"), metavar="PATH", help="for the pictures (default: HeapImg)")
    args = parser.parse_args()
    args.classes = list(dict.fromkeys(args.classes))
    if args.compare_layers and (args.worst or args.average or args.save_arrays or args.html):
        parser.error("--compare-layers draws one sheet: leave --worst, --average, --save-arrays and --html out")
    if args.average and (args.html or args.only_errors or args.target_class is not None):
        parser.error("--average covers each class as a whole: leave --html, --only-errors and --target-class out")
    if args.worst and args.target_class is not None:
        parser.error("--worst shows the predicted and the true class of each error: leave --target-class out")
    failures = 0
    set_threads()
    try:
        model, _ = load_checkpoint(args.checkpoint)
        args.target_layer = args.target_layer or default_layers(model)
        GradCAM(model, args.target_layer, args.method)  # complains of a layer that is none before anything is done
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.image:
            failures = paint_own_images(args, model)
        elif args.average:
            paint_average(args, model)
        elif args.worst:
            paint_worst(args, model)
        elif args.compare_layers:
            index = choose_test_images(args, model, 1)
            for e in explain_test_images(args, model, index if args.index else index[:1]):
                paint_layers(args, model, e, f"layers_{e.index:05d}.png")
        else:
            paint_test_images(args, model)
    except KeyboardInterrupt:
        print("Visulization.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (CheckpointError, dataset.DataError, ValueError, OSError) as error:
        raise SystemExit(f"Visulization.py: error: {dataset.one_line(error)}") from None
    if failures:
        raise SystemExit(f"Visulization.py: error: {failures} of {len(args.image)} pictures could not be explained")


if __name__ == "__main__":
    main()
