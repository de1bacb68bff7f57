"""A person's own picture of a garment becomes an image as the data set has it."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset import IMAGE_SIZE, UserError

# Not all that Pillow reads: it hands PostScript, which is a program, to Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def decode(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Brightness and opacity of a picture of any size, colour and depth: float32 arrays (H, W), 0 to 1."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("is not a file: name a picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            picture.load()
            with suppress(Exception):  # a damaged note on how the camera was held is no reason to give up
                picture = ImageOps.exif_transpose(picture)
            is_deep = picture.mode.startswith(("I", "F"))  # 16 bits or more, which convert("RGBA") would clip
            picture = picture.convert("F" if is_deep else "RGBA")
            highest = np.max(picture.getextrema())
            picture.thumbnail((1024, 1024), Image.Resampling.BOX)  # far more than is left of it in the end
            gray_alpha = np.asarray(picture if is_deep else picture.convert("LA"), np.float32)
    except UnidentifiedImageError:
        raise UserError(f"is no picture of a known format: give one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, MemoryError):
        raise UserError("has too many pixels: scale it down first") from None
    except Exception as error:  # Pillow reports damage as one of many types, SyntaxError and struct.error among them
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"is damaged ({reason.splitlines()[0]}): use another copy") from error
    if not is_deep:
        return gray_alpha[..., 0] / 255, gray_alpha[..., 1] / 255
    # The file does not say which value is white: the lowest usual one that no pixel exceeds.
    white = next(white for white in (1, 255, 65535, np.inf) if not highest > white)
    return np.clip(np.nan_to_num(gray_alpha) / white, 0, 1), np.ones_like(gray_alpha)


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture and bring it to the form of the data set's images.

    Follows the pipeline of the data set's paper (Xiao et al. 2017, section 2): grey, the background cut away on all
    sides, the longest side scaled to 28 pixels, centred on a dark background. Whether the picture itself has a light or
    a dark background is read off its border; transparent places count as background.

    Returns a uint8 array (28, 28); raises a UserError where `decode` does, and if the picture is transparent or even.
    """
    gray, alpha = decode(path)
    if not alpha.any():
        raise UserError("is transparent all over, there is nothing to classify: use another picture")
    border, border_alpha = (np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]) for x in (gray, alpha))
    if np.median(border_alpha) > 0.5:
        background = float(np.median(border[border_alpha > 0.5]))
    else:  # cut out: as the data set's garments were, photographed on white, unless it would vanish there
        background = 0.0 if (gray * alpha).sum() > 0.8 * alpha.sum() else 1.0
    # The garment may be lighter or darker than its background: what it mostly is becomes light on dark.
    contrast = (gray - background) * alpha
    if np.abs(contrast).max() < 0.02:
        raise UserError("is of one even colour, there is nothing to classify: use another picture")
    foreground = np.clip(contrast / (1 - background) if contrast.sum() > 0 else -contrast / background, 0, 1)
    inside = foreground > 0.05 * foreground.max()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    garment = foreground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    scale = IMAGE_SIZE / max(garment.shape)
    height, width = (max(1, round(side * scale)) for side in garment.shape)
    garment = cv2.resize(garment, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
    image[top : top + height, left : left + width] = garment
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
