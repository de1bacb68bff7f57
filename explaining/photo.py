"""A person's own picture of a garment becomes an image as the data set has it."""

import os
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.console import command
from common.files import UserError, printable
from dataset import IMAGE_SIZE

try:
    import cv2
except ImportError as error:  # most servers have no libGL.so.1
    pip = command("-m", "pip")
    advice = f"{pip} uninstall -y opencv-python && {pip} install opencv-python-headless"
    script = os.path.basename(sys.argv[0])
    raise SystemExit(f"{script}: error: {error}: {advice}") from None

# Without PostScript: it is a program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF")
WHITES = 1, 255, 1023, 4095, 16383, 65535  # of fractions, and of 8, 10, 12, 14 and 16 bits

Picture = np.ndarray  # RGB, float32 (H, W, 3), 0 to 1
Gray = np.ndarray  # also opacity: float32 (H, W), 0 to 1
Mask = np.ndarray  # bool (H, W)


def scale_to_white(values: np.ndarray) -> np.ndarray:
    """Values as fractions of the lowest usual white that holds them: few files name theirs."""
    values = np.nan_to_num(values, posinf=0, neginf=0)
    highest = values.max()
    # sharpening exceeds white a little
    white = next((white for white in WHITES if 1.1 * white >= highest), highest)
    return np.clip(values / white, 0, 1)


def decode(path: str | Path) -> tuple[Picture, Gray]:
    """A picture's colours and its opacity."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("is not a file: name a picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            picture.draft(None, (512, 512))  # a large JPEG, four times as fast
            picture.load()
            with suppress(Exception):  # damaged orientation data is no reason to give up
                picture = ImageOps.exif_transpose(picture)
            is_deep = picture.mode.startswith(("I", "F"))  # grey, of more than 8 bits
            picture = picture.convert("F" if is_deep else "RGBA")
            picture.thumbnail((512, 512), Image.BOX)
            pixels = np.asarray(picture, np.float32)
    except Exception as error:  # Pillow raises many types
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot be read ({reason}): export it as PNG or JPEG") from error
    if is_deep:
        gray = scale_to_white(pixels)
        return np.dstack([gray] * 3), np.ones_like(gray)
    return pixels[..., :3] / 255, pixels[..., 3] / 255


def bounding_box(mask: Mask) -> tuple[slice, slice]:
    """The rows and columns that hold all of it."""
    x, y, width, height = cv2.boundingRect(np.uint8(mask))
    return slice(y, y + height), slice(x, x + width)


def edges(mask: Mask) -> np.ndarray:
    """The pixels along the four sides."""
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


def is_stripe(found: Mask, opaque: Mask) -> bool:
    """Whether most rows, or columns, of what was found cross all that is opaque."""
    for axis in (0, 1):
        crossed = found.sum(axis) > 0.95 * opaque.sum(axis)
        if crossed[found.any(axis)].mean() > 0.5:
            return True
    return False


def fill_transparent(colors: Picture, opacity: Gray) -> Picture:
    """Give what is transparent the colour of the nearest opaque pixel."""
    opaque = opacity > opacity.max() - 0.01  # not the edges, which are mixed with white
    _, nearest = cv2.distanceTransformWithLabels(
        np.uint8(~opaque), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    palette = np.zeros((nearest.max() + 1, 3), np.float32)
    palette[nearest[opaque]] = colors[opaque]
    return palette[nearest]


def shrink(picture: np.ndarray) -> np.ndarray:
    """Scale it down to at most 256 pixels a side, enough to find the garment."""
    scale = min(1, 256 / max(picture.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def strip_frame(colors: Picture) -> Picture:
    """Cut bars off opposite sides: up to a fifth each, ending in a jump of colour."""
    for turn in (1, -1):  # the sides, and then above and below
        colors = np.rot90(colors, turn)
        lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)
        widths = []
        for lines in (lab, lab[::-1]):
            change = np.abs(np.diff(lines[: len(lines) // 5 + 1], axis=0)).max(axis=2)
            jumps = np.flatnonzero(np.quantile(change, 0.1, axis=1) > 8)
            widths.append(max(jumps, default=-1) + 1)
        if min(widths) > 0:  # one alone may be what is below a wide shoe
            colors = colors[widths[0] : -widths[1]]
    return colors


def fit_surface(values: np.ndarray, border: Mask) -> np.ndarray:
    """A quadratic surface, (H, W, C), fitted to values at the border but outliers (Cauchy)."""
    y, x = np.mgrid[-1 : 1 : border.shape[0] * 1j, -1 : 1 : border.shape[1] * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    wanted = values[border]
    error = np.linalg.norm(wanted - np.median(wanted, axis=0), axis=1)
    scale = 1 + np.quantile(error, 0.3)
    weight = 1 / (1 + (error / scale) ** 2)[:, None]
    factors = np.linalg.lstsq(terms[border] * weight, wanted * weight, rcond=None)[0]
    return (terms @ factors).astype(np.float32)


def find_garment(colors: Picture) -> tuple[Mask, Gray]:
    """A garment, and its background's grey."""
    pixel = max(colors.shape) / 256
    blurred = cv2.GaussianBlur(colors, (0, 0), pixel)
    lab = cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB)
    n = max(1, round(8 * pixel))
    border = np.ones(lab.shape[:2], bool)
    border[n:-n, n:-n] = False
    surface = fit_surface(lab, border)
    distance = np.linalg.norm(lab - surface, axis=2)  # in CIELAB, white is 100 from black
    is_busy = np.quantile(distance[border], 0.6) > 1
    corners = np.median([lab[:n, :n], lab[:n, -n:], lab[-n:, :n], lab[-n:, -n:]], axis=(1, 2))
    spread = np.linalg.norm(corners - np.median(corners, axis=0), axis=1).max()
    if spread > 5:  # then what continues from edge to edge is background, too
        for axis in (0, 1):
            turned = lab.swapaxes(0, axis)
            ends = np.median(turned[:n], axis=0), np.median(turned[-n:], axis=0)
            line = np.linspace(*ends, len(turned))
            to_line = np.linalg.norm(turned - line, axis=2).swapaxes(0, axis)
            distance = np.minimum(distance, to_line)
    garment = distance > max(3, 0.06 * distance.max())  # what is fainter is background
    if is_busy:
        levels = np.uint8((2 * distance).clip(0, 255))
        otsu, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
        garment &= distance > 0.3 * otsu
    if is_busy and 0 < garment.mean() < 1:  # GrabCut (Rother et al. 2004) looks again
        labels = np.uint8(np.where(garment, cv2.GC_PR_FGD, cv2.GC_PR_BGD))
        models = np.zeros((2, 1, 65))
        cv2.setRNGSeed(0)  # a picture's result is the same after any others
        pixels = np.uint8(blurred * 255)
        cv2.grabCut(pixels, labels, None, *models, 1, cv2.GC_INIT_WITH_MASK)
        garment = labels == cv2.GC_PR_FGD
    _, pieces = cv2.connectedComponents(np.uint8(garment))
    sizes = np.bincount(pieces[garment], minlength=1)
    garment &= (sizes >= 0.05 * sizes.max())[pieces]
    background = cv2.cvtColor(cv2.cvtColor(surface, cv2.COLOR_LAB2RGB), cv2.COLOR_RGB2GRAY)
    return garment, background


def find_in_shape(picture: Picture, opacity: Gray) -> tuple[Picture, Mask, Gray] | None:
    """The garment in a photograph that was cut to a disc or so: colours, garment, background.

    None where the garment itself was cut out.
    """
    opaque = opacity > 0.5
    box = bounding_box(opaque)
    shape = opaque[box]
    asymmetry = max((shape != shape[::-1]).mean(), (shape != shape[:, ::-1]).mean())
    if edges(opaque).mean() <= 0.5 and asymmetry >= 0.02:
        return None
    opacity = shrink(opacity[box])
    colors = fill_transparent(shrink(picture[box]), opacity)
    garment, background = find_garment(colors)
    reaches_edges = edges(garment).mean() > 0.25
    garment &= opacity > 0.5
    extent = max(garment.any(axis=0).mean(), garment.any(axis=1).mean())
    if extent <= 0.5 or reaches_edges or is_stripe(garment, opacity > 0.5):
        return None
    return colors, garment, background


def to_data_set(gray: Gray, opacity: Gray, background: Gray | float) -> np.ndarray:
    """A garment's image, uint8 (28, 28), from its grey, its opacity and the grey behind it."""
    is_lighter = ((gray - background) * opacity).sum() > 0
    room = is_lighter - background  # up to white, or down to black
    value = (gray - background) / np.where(room == 0, 1, room)
    is_faint = np.quantile(value[opacity > 0.5], 0.9) < 0.2
    if is_faint or (is_lighter and np.median(background) > 0.3):
        value = 1 - gray  # as on white; on black, garments are as light as the data set's
    value = np.clip(value, 0.1, 1) * opacity  # no part of it vanishes
    value = np.float32(value[bounding_box(opacity > 0.5)])
    side = max(value.shape)
    square = np.pad(value, [((side - n) // 2, (side - n + 1) // 2) for n in value.shape])
    image = cv2.resize(square, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return np.uint8(np.rint(image * 255))


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Bring a picture to the data set's form, as its paper does, but without sharpening.

    Returns the image, uint8 (28, 28), and the picture on white, uint8 RGB (H, W, 3), at most 512
    pixels a side. A UserError says why there is no image.
    """
    colors, opacity = decode(path)
    opaque = opacity > 0.5
    if not opaque.any():
        raise UserError("is transparent all over: use another picture")
    picture = 1 - (1 - colors) * opacity[..., None]
    background = None
    if opaque.all():
        colors = strip_frame(shrink(picture))
        opacity, background = find_garment(colors)
        if not opacity.any():
            raise UserError("is of one even colour or pattern: use another picture")
    elif found := find_in_shape(picture, opacity):
        colors, opacity, background = found
    gray = cv2.cvtColor(colors, cv2.COLOR_RGB2GRAY)
    if background is None:  # white, as the data set's garments had, unless it would vanish there
        background = float((gray * opacity).sum() <= 0.8 * opacity.sum())
    image = to_data_set(gray, opacity, background)
    return image, np.uint8(np.rint(picture * 255))


@cache
def image_of(path: Path) -> np.ndarray | None:
    """The image of a picture in a folder of data, read once; if it cannot be, None and a note."""
    try:
        return read_image(path)[0]
    except UserError as error:
        tqdm.write(f"left out: {printable(path)} {printable(error)}", sys.stderr)
        return None
