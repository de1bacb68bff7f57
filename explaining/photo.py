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

Image.init()
# Not all that Pillow reads: it hands PostScript, which is a program, to Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF")
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
MAX_FRAMES = 100  # among which one that is not blank is looked for
WHITES = 1, 255, 1023, 4095, 16383, 65535  # of fractions, and of 8, 10, 12, 14 and 16 bits
WORKING_SIZE = 256  # pixels of the longer side in which the garment is looked for
# Distances in CIELAB, where black and white are 100 apart.
FAINT = 3.0  # pixels this close to the background count as background
BUSY = 1.0  # a background that differs by this from a smooth one gets a closer look


def read_frame(picture: Image.Image) -> tuple[Image.Image, bool]:
    """The first frame or page that is not blank, and whether it has more than 8 bits a value.

    Blank is what has one colour or is transparent all over. The frame is upright, and of mode "F"
    if it is grey and has more than 8 bits, "RGBA" otherwise.
    """
    for number in range(MAX_FRAMES):
        try:
            picture.seek(number)
        except EOFError:
            break
        is_deep = picture.mode.startswith(("I", "F")) or ";16" in str(picture.tile)
        picture.load()
        frame = picture
        with suppress(Exception):  # damaged orientation data is no reason to give up
            frame = ImageOps.exif_transpose(picture)
        is_gray = frame.mode.startswith(("I", "F"))  # convert("RGBA") would clip its values
        frame = frame.convert("F" if is_gray else "RGBA")
        lowest, highest = np.reshape(frame.getextrema(), (-1, 2)).T  # of the channels, opacity last
        if (lowest != highest).any() and highest[-1] > 0:
            break
    return frame, is_deep


def scale_to_white(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Values of more than 8 bits as fractions of white, 0 to 1, and a reason for doubt, or "".

    The file does not say which value is white. It is taken to be that of the lowest usual depth
    that holds all values.
    """
    values = np.nan_to_num(values, posinf=0, neginf=0)
    highest = values.max()
    # sharpening exceeds white a little
    enough = [white for white in WHITES if 1.1 * white >= highest]
    white = enough[0] if enough else highest
    note = ""
    if not enough or 1 < highest <= white / 2:
        note = f"the file does not say which value is white: {white:.0f} is a guess"
    return np.clip(values / white, 0, 1), note


def decode(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """A picture's colours, float32 RGB (H, W, 3), and its opacity, (H, W), both 0 to 1.

    The third value is a reason to doubt them, or "". Raises a UserError if the file cannot be read.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("is not a file: name a picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            frame, is_deep = read_frame(picture)
            frame.thumbnail((1024, 1024), Image.Resampling.BOX)  # far more than is needed
            pixels = np.asarray(frame, np.float32)
    except UnidentifiedImageError:
        start = np.fromfile(path, np.uint8, 16).tobytes().ljust(16)
        if start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            raise UserError("this is HEIC: export it as JPEG") from None
        for kind in FORMATS:
            _, is_such = Image.OPEN[kind]
            if is_such(start):
                advice = "is damaged or of a kind that cannot be read: export it as PNG or JPEG"
                raise UserError(f"this {kind} file {advice}") from None
        known = ", ".join(FORMATS)
        raise UserError(f"is no picture of a known format: give one of {known}") from None
    except (Image.DecompressionBombError, MemoryError):
        raise UserError("has too many pixels: scale it down first") from None
    except Exception as error:  # of one of many types, such as SyntaxError and struct.error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        advice = "use another copy, or export it as PNG or JPEG"
        raise UserError(f"cannot be read ({reason}): {advice}") from error
    if frame.mode == "F":
        values, note = scale_to_white(pixels)
        return np.stack([values] * 3, axis=-1), np.ones_like(values), note
    colors, opacity, note = pixels[..., :3] / 255, pixels[..., 3] / 255, ""
    if is_deep:  # Pillow keeps the upper 8 of the 16 bits of colours
        if pixels[..., :3].max() < 4:
            raise UserError("uses 10 or less of its 16 bits, too few in colour: export it with 8")
        colors, note = scale_to_white(pixels[..., :3] * 257)
    return colors, opacity, note


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns from the first True of a mask, bool (H, W), to its last."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def edges(values: np.ndarray) -> np.ndarray:
    """The outermost values of a picture, (H, W), in one row."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def has_shape_of_photograph(opaque: np.ndarray) -> bool:
    """Whether what is opaque, bool (H, W), has the shape of a photograph, not of a garment.

    It then covers most of the edges, or hardly differs from its mirror images, as a disc or a
    rounded rectangle.
    """
    part = opaque[bounding_box(opaque)]
    asymmetry = max((part != part[::-1]).mean(), (part != part[:, ::-1]).mean())
    return edges(opaque).mean() > 0.5 or asymmetry < 0.02


def is_stripe(found: np.ndarray, opaque: np.ndarray) -> bool:
    """Whether most rows, or columns, of what was found, bool (H, W), cross all that is opaque."""
    for axis in (0, 1):
        lines = found.any(axis=axis)
        crossed = found.sum(axis=axis) > 0.95 * opaque.sum(axis=axis)
        if crossed[lines].mean() > 0.5:
            return True
    return False


def fill_transparent(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Give what is transparent in colours (H, W, 3) the colour of the nearest opaque pixel."""
    opaque = opacity > opacity.max() - 0.01  # not the edges, which are mixed with white
    clear = (~opaque).astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(
        clear, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    palette = np.zeros((nearest.max() + 1, 3), np.float32)
    palette[nearest[opaque]] = colors[opaque]
    return palette[nearest]


def shrink(picture: np.ndarray) -> np.ndarray:
    """A picture, float32 (H, W) or (H, W, 3), at most 256 pixels a side."""
    scale = min(1, WORKING_SIZE / max(picture.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def bar_width(colors: np.ndarray) -> int:
    """How many of the first lines of a picture, float32 RGB (H, W, 3), are a bar: at most a fifth.

    A bar ends in a jump of colour along nearly its whole length; a garment does not.
    """
    lines = np.ascontiguousarray(colors[: len(colors) // 5 + 1])
    lab = cv2.cvtColor(lines, cv2.COLOR_RGB2LAB)
    change = np.abs(np.diff(lab, axis=0)).max(axis=2)
    jumps = np.flatnonzero(np.quantile(change, 0.1, axis=1) > 8)
    return jumps[-1] + 1 if len(jumps) else 0


def strip_frame(colors: np.ndarray) -> np.ndarray:
    """Cut bars off opposite sides of a picture, float32 RGB (H, W, 3), up to a fifth of it each."""
    for turn in (1, -1):  # the sides, and then above and below
        colors = np.rot90(colors, turn)
        first, last = bar_width(colors), bar_width(colors[::-1])
        if first and last:  # one alone may be what is below a wide shoe
            colors = colors[first:-last]
    return np.ascontiguousarray(colors)


def fit_surface(values: np.ndarray, border: np.ndarray) -> np.ndarray:
    """The quadratic surface through most of the values (H, W, C) at the border, bool (H, W).

    Those far from their median, as of a garment that reaches the edge, hardly count (Cauchy
    weights).
    """
    y, x = np.mgrid[-1 : 1 : border.shape[0] * 1j, -1 : 1 : border.shape[1] * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    inputs, wanted = terms[border], values[border]
    error = np.linalg.norm(wanted - np.median(wanted, axis=0), axis=1)
    scale = 1 + np.quantile(error, 0.3)
    weight = 1 / (1 + (error / scale) ** 2)[:, None]
    factors = np.linalg.lstsq(inputs * weight, wanted * weight, rcond=None)[0]
    return (terms @ factors).astype(np.float32)


def refine(garment: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Find a garment, bool (H, W), anew by its colours: GrabCut (Rother et al. 2004)."""
    labels = np.where(garment, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    models = np.zeros((2, 1, 65))
    cv2.setRNGSeed(0)  # a picture's result is the same after any others
    cv2.grabCut((colors * 255).astype(np.uint8), labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    return labels == cv2.GC_PR_FGD


def find_garment(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """A garment, bool (H, W), its background's grey, float (H, W), and whether to doubt them."""
    pixel = max(colors.shape) / WORKING_SIZE
    blurred = cv2.GaussianBlur(colors, (0, 0), pixel)
    lab = cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB)
    n = max(1, round(8 * pixel))
    border = np.ones(lab.shape[:2], bool)
    border[n:-n, n:-n] = False
    surface = fit_surface(lab, border)
    smooth = np.linalg.norm(lab - surface, axis=2)
    distance = smooth
    corners = [lab[:n, :n], lab[:n, -n:], lab[-n:, :n], lab[-n:, -n:]]
    corners = np.stack([np.median(corner, axis=(0, 1)) for corner in corners])
    spread = np.linalg.norm(corners - np.median(corners, axis=0), axis=1).max()
    if spread > 5:  # then what continues from edge to edge is background, too
        for axis in (0, 1):
            turned = lab.swapaxes(0, axis)
            first, last = np.median(turned[:n], axis=0), np.median(turned[-n:], axis=0)
            line = np.linspace(first, last, len(turned))
            to_line = np.linalg.norm(turned - line, axis=2).swapaxes(0, axis)
            distance = np.minimum(distance, to_line)
    cut = max(FAINT, 0.06 * distance.max())
    is_busy = np.quantile(smooth[border], 0.6) > BUSY
    if is_busy:
        levels = (2 * distance).clip(0, 255).astype(np.uint8)
        otsu, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
        cut = max(cut, 0.3 * otsu)
    garment = distance > cut
    if is_busy and 0 < garment.mean() < 1:
        garment = refine(garment, blurred)
    _, pieces, statistics, _ = cv2.connectedComponentsWithStats(garment.astype(np.uint8))
    sizes = statistics[:, cv2.CC_STAT_AREA]
    sizes[0] = 0  # the background
    garment &= (sizes >= 0.05 * sizes.max())[pieces]
    background = cv2.cvtColor(cv2.cvtColor(surface, cv2.COLOR_LAB2RGB), cv2.COLOR_RGB2GRAY)
    return garment, background, bool(is_busy or garment[border].mean() > 0.25)


def to_data_set(
    gray: np.ndarray, opacity: np.ndarray, background: np.ndarray | float
) -> np.ndarray:
    """A garment's image, uint8 (28, 28), of its grey, its opacity and the grey behind, (H, W)."""
    is_lighter = ((gray - background) * opacity).sum() > 0
    room = is_lighter - background  # up to white, or down to black
    value = (gray - background) / np.where(room == 0, 1, room)
    is_faint = np.quantile(value[opacity > 0.5], 0.9) < 0.2
    if is_faint or (is_lighter and np.median(background) > 0.3):
        value = 1 - gray  # as on white; on black, garments are as light as the data set's
    value = np.clip(value, 0.1, 1) * opacity  # no part of it vanishes
    value = value[bounding_box(opacity > 0.5)].astype(np.float32)
    side = max(value.shape)
    square = np.pad(value, [((side - n) // 2, (side - n + 1) // 2) for n in value.shape])
    image = cv2.resize(square, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return np.rint(image * 255).astype(np.uint8)


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Bring a picture to the data set's form, as its paper does (Xiao et al. 2017, section 2).

    But it is not sharpened. Returns the image, uint8 (28, 28); the picture, uint8 RGB (H, W, 3), at
    most 1024 pixels a side, transparent parts white; and a reason to doubt the image, or "".
    Raises a UserError where `decode` does, and if there is no garment.
    """
    colors, opacity, note = decode(path)
    notes = [note]
    opaque = opacity > 0.5
    if not opaque.any():
        raise UserError("is transparent all over: use another picture")
    picture = 1 - (1 - colors) * opacity[..., None]
    background = None
    if opaque.all():
        colors = strip_frame(shrink(picture))
        opacity, background, is_doubtful = find_garment(colors)
        if not opacity.any():
            raise UserError("is of one even colour or pattern: use another picture")
        if is_doubtful:
            notes.append("the background is not even, or the garment reaches the edges")
    elif has_shape_of_photograph(opaque):
        box = bounding_box(opaque)
        part, opacity_of_part = shrink(picture[box]), shrink(opacity[box])
        part = fill_transparent(part, opacity_of_part)
        garment, surface, _ = find_garment(part)
        reaches_edges = edges(garment).mean() > 0.25
        garment &= opacity_of_part > 0.5
        is_print = not garment.any() or is_stripe(garment, opacity_of_part > 0.5)
        extent = max(garment.any(axis=0).mean(), garment.any(axis=1).mean())
        if extent > 0.5 and not reaches_edges and not is_print:
            colors, opacity, background = part, garment, surface
            notes.append("taken for a photograph, not for a garment that was cut out")
        elif garment.any():
            notes.append("taken for a garment that was cut out, not for a photograph")
    gray = cv2.cvtColor(np.ascontiguousarray(colors), cv2.COLOR_RGB2GRAY)
    if background is None:  # white, as the data set's garments had, unless it would vanish there
        background = float((gray * opacity).sum() <= 0.8 * opacity.sum())
    image = to_data_set(gray, opacity, background)
    return image, np.rint(picture * 255).astype(np.uint8), "; ".join(filter(None, notes))
