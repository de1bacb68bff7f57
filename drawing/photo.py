"""A person's own picture of a garment becomes an image as the data set has it."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.files import UserError
from dataset import IMAGE_SIZE

Image.init()  # Not all that Pillow reads: it hands PostScript, which is a program, to Ghostscript.
FORMATS = tuple(x for x in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF") if x in Image.OPEN)
WORKING_SIZE = 256  # pixels of the longer side in which the garment is looked for
FAINT = 3.0  # pixels this close to the background count as background; in CIELAB, black and white are 100 apart
BUSY = 1.0  # a background that differs by this from a smooth one gets a closer look


def decode(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Colours and opacity of a picture of any size and depth: float32 (H, W, 3), RGB, and (H, W), 0 to 1."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("is not a file: name a picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            picture.load()
            with suppress(Exception):  # damaged orientation data is no reason to give up
                picture = ImageOps.exif_transpose(picture)
            is_deep = picture.mode.startswith(("I", "F"))  # 16 bits or more, which convert("RGBA") would clip
            picture = picture.convert("F" if is_deep else "RGBA")
            highest = np.max(picture.getextrema())
            picture.thumbnail((1024, 1024), Image.Resampling.BOX)  # far more than the final image needs
            pixels = np.asarray(picture, np.float32)
    except UnidentifiedImageError:
        if bytes(np.fromfile(path, np.uint8, 12)[8:]) in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            raise UserError("this is HEIC: export it as JPEG") from None
        raise UserError(f"is no picture of a known format: give one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, MemoryError):
        raise UserError("has too many pixels: scale it down first") from None
    except Exception as error:  # Pillow reports damage as one of many types, SyntaxError and struct.error among them
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot be read ({reason.splitlines()[0]}): use another copy") from error
    if not is_deep:
        return pixels[..., :3] / 255, pixels[..., 3] / 255
    # The file does not say which value is white: the lowest usual one that no pixel exceeds.
    white = next(white for white in (1, 255, 65535, np.inf) if not highest > white)
    return np.stack([np.clip(np.nan_to_num(pixels) / white, 0, 1)] * 3, axis=-1), np.ones_like(pixels)


def strip_frame(colors: np.ndarray) -> np.ndarray:
    """Cut even bars off opposite sides of a picture, float32 RGB (H, W, 3), up to a fifth of it each."""
    for turn in (1, -1):  # a bar ends in a jump of colour along nearly its whole length; a garment does not
        colors, widths = np.rot90(colors, turn), []
        for half in (colors, colors[::-1]):
            lab = cv2.cvtColor(np.ascontiguousarray(half[: len(half) // 5 + 2]), cv2.COLOR_RGB2LAB)
            is_even = np.ptp(np.quantile(lab, (0.05, 0.95), axis=1), axis=0).max(axis=1) < 8
            jump = np.quantile(np.abs(lab[2:] - lab[:-2]).max(axis=2), 0.1, axis=1)  # two lines on: edges are blurred
            widths.append(max(np.flatnonzero(np.logical_and.accumulate(is_even)[:-2] & (jump > 8)), default=-2) + 2)
        if all(widths):  # only one may be the table that a shoe stands on
            colors = colors[widths[0] : -widths[1]]
    return np.ascontiguousarray(colors)


def fit_surface(values: np.ndarray, keep: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The quadratic surface near `start`, (C,), through most of the values (H, W, C) where `keep`, bool (H, W)."""
    y, x = np.mgrid[-1 : 1 : keep.shape[0] * 1j, -1 : 1 : keep.shape[1] * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    some = slice(None, None, max(1, keep.sum() // 2000))  # more do not make it better
    inputs, wanted = terms[keep][some], values[keep][some]
    error = np.linalg.norm(wanted - start, axis=1)
    for _ in range(6):  # outliers, such as a garment that reaches the edge, hardly count (Cauchy weights)
        weight = 1 / (1 + (error / (1 + np.quantile(error, 0.3))) ** 2)[:, None]
        factors = np.linalg.lstsq(inputs * weight, wanted * weight, rcond=None)[0]
        error = np.linalg.norm(wanted - inputs @ factors, axis=1)
    near = wanted[error <= 1 + 4 * np.quantile(error, 0.3)]
    return np.clip(terms @ factors, near.min(axis=0) - 5, near.max(axis=0) + 5)  # it may go anywhere between them


def find_garment(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """A picture's garment, bool (H, W), its background's grey, float32 (H, W), and whether to doubt them."""
    pixel = max(colors.shape) / WORKING_SIZE
    blurred = cv2.GaussianBlur(colors, (0, 0), pixel)
    lab, n = cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB), max(1, round(8 * pixel))
    border = np.ones(lab.shape[:2], bool)
    border[n:-n, n:-n] = False
    corners = np.stack([np.median(x, axis=(0, 1)) for x in (lab[:n, :n], lab[:n, -n:], lab[-n:, :n], lab[-n:, -n:])])
    start, keep, others = np.median(corners, axis=0), border, []
    if np.linalg.norm(corners - start, axis=1).max() > 5:  # then what continues from edge to edge is background, too
        start = np.median(lab[border], axis=0)
        for axis in (0, 1):
            turned = lab.swapaxes(0, axis)
            line = np.linspace(np.median(turned[:n], axis=0), np.median(turned[-n:], axis=0), len(turned))
            others.append(np.linalg.norm(turned - line, axis=2).swapaxes(0, axis))
    for _ in range(2):  # at first from the border, then from all that is not garment
        surface = fit_surface(lab, keep, start)
        smooth = np.linalg.norm(lab - surface, axis=2)
        distance = np.minimum.reduce([smooth, *others])
        cut = max(FAINT, 0.06 * np.quantile(distance, 0.995))
        if is_busy := np.quantile(smooth[border], 0.6) > BUSY:
            otsu, _ = cv2.threshold((2 * distance).clip(0, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
            cut = max(cut, 0.3 * otsu)
        garment = distance > cut
        rest = cv2.dilate(garment.astype(np.uint8), np.ones((1 + 2 * round(4 * pixel),) * 2)) == 0
        keep = rest if rest.mean() > 0.1 else keep
    if is_busy and 0 < garment.mean() < 1:  # GrabCut (Rother et al. 2004) refines it, using the colours of both
        labels = np.where(garment, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        cv2.setRNGSeed(0)  # it draws random numbers: a picture's result is the same beside any others
        cv2.grabCut((blurred * 255).astype(np.uint8), labels, None, *np.zeros((2, 1, 65)), 3, cv2.GC_INIT_WITH_MASK)
        better = labels == cv2.GC_PR_FGD
        garment = better if 0.3 < better.sum() / garment.sum() < 3 else garment  # it may lose its way
    _, pieces, statistics, _ = cv2.connectedComponentsWithStats(garment.astype(np.uint8))
    sizes = np.where(np.arange(len(statistics)) > 0, statistics[:, cv2.CC_STAT_AREA], 0)  # the first is the background
    garment &= (sizes >= 0.05 * sizes.max())[pieces]
    background = cv2.cvtColor(cv2.cvtColor(surface.astype(np.float32), cv2.COLOR_LAB2RGB), cv2.COLOR_RGB2GRAY)
    return garment, background, bool(is_busy or garment[border].mean() > 0.25)


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Bring a picture to the data set's form, much as its paper does (Xiao et al. 2017, section 2), but unsharpened.

    Returns the image, uint8 (28, 28); the picture, uint8 RGB (H, W, 3), at most 1024 pixels a side, transparent parts
    white; and a reason to doubt the image, or "". Raises a UserError where `decode` does, and if there is no garment.
    """
    colors, opacity = decode(path)
    if not opacity.any():
        raise UserError("is transparent all over, so there is nothing to classify: use another picture")
    picture, background, note = 1 - (1 - colors) * opacity[..., None], None, ""
    if np.median(np.concatenate([opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]])) > 0.5:
        size = [max(1, round(side * min(1, WORKING_SIZE / max(opacity.shape)))) for side in opacity.shape[::-1]]
        colors = strip_frame(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
        opacity, background, is_doubtful = find_garment(colors)
        note = "the background is not even, or the garment reaches the edges" if is_doubtful else ""
    gray = cv2.cvtColor(np.ascontiguousarray(colors), cv2.COLOR_RGB2GRAY)
    if background is None:  # as the data set's garments were, photographed on white, unless it would vanish there
        background = float((gray * opacity).sum() <= 0.8 * opacity.sum())
    rows, columns = (np.flatnonzero((opacity > 0.5).any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        raise UserError("is of one even colour, so there is nothing to classify: use another picture")
    is_lighter = ((gray - background) * opacity).sum() > 0
    room = is_lighter - background  # up to white, or down to black
    value = (gray - background) / np.where(room == 0, 1, room)
    if (is_lighter and np.median(background) > 0.3) or np.quantile(value[opacity > 0.5], 0.9) < 0.2:
        value = 1 - gray  # as it would be on white; on black garments are as light as the data set's
    value = np.clip(value, 0.1, 1) * opacity  # no part of it vanishes
    value = value[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    side = max(value.shape)
    square = np.pad(value, [((side - n) // 2, (side - n + 1) // 2) for n in value.shape])
    image = cv2.resize(square, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return np.rint(image * 255).astype(np.uint8), np.rint(picture * 255).astype(np.uint8), note
