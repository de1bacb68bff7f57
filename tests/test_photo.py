"""A person's picture becomes 28x28: what comes out is worked out by hand."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from common.files import UserError

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
import cv2
from photographs import photograph, read_back

from explaining.photo import read_image

# 40 pixels tall and 20 wide: scaled by 0.7 it is 28 tall, 14 wide, and 7 from the left.
GARMENT = np.zeros((60, 60), np.uint8)
GARMENT[10:50, 15:35] = 200
GARMENT[10:20, 15:25] = 100
EXPECTED = np.zeros((28, 28), np.int64)
EXPECTED[:, 7:21] = 200
EXPECTED[:7, 7:14] = 100
OPAQUE = 255 * np.uint8(GARMENT > 0)


def read(folder, gray, opacity=None):
    """The image, int64, that is made of a picture of these values, uint8 (H, W)."""
    picture = Image.fromarray(gray)
    if opacity is not None:
        picture.putalpha(Image.fromarray(opacity))
    picture.save(folder / "a.png")
    return read_image(folder / "a.png")[0].astype(int)


@pytest.mark.parametrize(
    "garment, background, is_cut_out, expected",
    [
        (255, 230, False, 26),  # white on white: dark, as in the data set, but at least a tenth
        (200, 110, False, 55),  # as it would be on white: 255 - 200
        (200, 40, False, 190),  # on black: (200 - 40) / (255 - 40)
        (20, 110, False, 209),  # (110 - 20) / 110
        (100, 110, False, 155),  # too faint for that: 255 - 100
        (255, 0, True, 255),  # white and cut out: on black
        (0, 0, True, 255),  # black and cut out: on white
    ],
)
def test_a_garment_may_be_lighter_or_darker_than_any_background(
    tmp_path, garment, background, is_cut_out, expected
):
    pixels = np.where(GARMENT > 0, garment, background).astype(np.uint8)
    found = read(tmp_path, pixels, OPAQUE if is_cut_out else None)
    assert np.abs(found - np.where(EXPECTED > 0, expected, 0)).max() <= 1


def variants():
    """The garment in many kinds of files: the name, the picture, and how to save it."""
    gray = Image.fromarray(GARMENT)
    sideways = Image.Exif()
    sideways[0x112] = 6  # the camera was held on its side: to be turned by 90 degrees
    big_endian = (GARMENT.astype(np.uint16) * 257).astype(">u2").tobytes()
    yield "big end first.tiff", Image.frombytes("I;16B", gray.size, big_endian), {}
    holes = GARMENT.astype(np.float32) / 255
    holes[0, :2] = np.nan, np.inf
    yield "floating point.tiff", Image.fromarray(holes), {}
    yield "moving.gif", gray, dict(save_all=True, append_images=[gray.rotate(90)])
    yield "turned by the camera.png", gray.rotate(90), dict(exif=sideways)
    yield "with a damaged note.jpg", gray, dict(exif=b"Exif\0\0MM", quality=100)
    if features.check("avif"):
        yield "photo.avif", gray, dict(quality=100)


@pytest.mark.parametrize("name, picture, options", list(variants()))
def test_files_of_every_kind_come_out_alike(tmp_path, name, picture, options):
    picture.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)[0].astype(int)
    tolerance = {"with a damaged note.jpg": 8, "photo.avif": 12}.get(name, 1)
    assert found.shape == (28, 28) and np.abs(found - EXPECTED).max() <= tolerance


def test_a_large_picture_is_averaged_not_sampled(tmp_path):
    pixels = np.random.default_rng(0).integers(100, 256, (56, 56), np.uint8)
    means = pixels.reshape(28, 2, 28, 2).mean(axis=(1, 3))
    assert np.abs(read(tmp_path, np.pad(pixels, 12)) - means).max() < 0.51  # rounded


# CIELAB's lightness is 80.6 of a grey of 200, 21.2 of 50, and 2.5, 4.7 and 5.2 of 9, 16 and 18.
@pytest.mark.parametrize(
    "lightest, haze, is_background", [(200, 16, True), (200, 18, False), (50, 9, True)]
)
def test_what_is_as_faint_as_a_shadow_is_background(tmp_path, lightest, haze, is_background):
    pixels = GARMENT // (200 // lightest)
    expected = read(tmp_path, pixels)
    pixels[10:50, 40:50] = haze
    assert np.array_equal(read(tmp_path, pixels), expected) == is_background


@pytest.mark.parametrize(
    "values, white",
    [
        (GARMENT.astype(np.uint16), 255),
        (GARMENT.astype(np.uint16) * 8, 4095 / 8),
        (GARMENT.astype(np.int32) * 10**6, 200),
        (GARMENT.astype(np.float32) / 190, 190),  # sharpened beyond white
    ],
)
def test_which_value_is_white_is_guessed(tmp_path, values, white):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    image, _ = read_image(tmp_path / "a.tiff")
    assert np.abs(image - (EXPECTED * 255 / white).clip(0, 255)).max() <= 1


@pytest.mark.parametrize("turn", [0, 1])
def test_a_cut_out_bag_with_a_stripe_is_no_photograph(tmp_path, turn):
    gray, opacity = np.full((200, 300), 40, np.uint8), np.zeros((200, 300), np.uint8)
    opacity[20:180, 20:280] = 255
    gray[80:110, 20:280] = 220
    image = read(tmp_path, np.rot90(gray, turn), np.rot90(opacity, turn))
    assert (image > 0).mean() == pytest.approx(160 / 260, abs=0.03)


@pytest.mark.parametrize("shape", ["ellipse", "rectangle", "polygon"])
def test_a_photograph_may_be_transparent_around(tmp_path, shape):
    opacity = Image.new("L", (60, 60))
    draw = ImageDraw.Draw(opacity)
    if shape == "polygon":
        draw.polygon([(-40, 60), (20, 0), (60, 0), (60, 60)], fill=255)
    else:
        getattr(draw, shape)((0, 0, 59, 59), fill=255)
    margin = 0 if shape == "polygon" else ((14, 16), (3, 17))
    image = read(tmp_path, np.pad(255 - GARMENT, margin), np.pad(opacity, margin))
    assert np.abs(image - EXPECTED).max() <= 1


@pytest.mark.parametrize("kind", ["flap", "print", "notch"])
def test_a_garment_that_was_cut_out_stays_whole(tmp_path, kind):
    pixels, opacity, expected = np.full((60, 60), 90, np.uint8), OPAQUE.copy(), EXPECTED > 0
    if kind == "flap":
        pixels[12:48, 15:28] = 250  # at 36 of the edges' 120 pixels
    elif kind == "print":
        pixels[26:29, 20:28] = 250  # less than half as wide
    else:  # no photograph has this shape
        pixels[25:45, 20:30] = 250
        opacity[10:14, 15:25] = 0
        expected[:2, 7:14] = False
    assert np.array_equal(read(tmp_path, pixels, opacity) > 0, expected)


@pytest.mark.parametrize("width", [20, 48])
def test_a_garment_may_reach_from_edge_to_edge(tmp_path, width):
    pixels = np.zeros((56, 100), np.uint8)
    pixels[:, 30 : 30 + width] = 200  # a ninth or a third of the outermost 3 pixels
    expected = np.zeros((28, 28), int)
    expected[:, 14 - width // 4 : 14 + width // 4] = 200
    assert np.abs(read(tmp_path, pixels) - expected).max() <= 1


def test_no_frame_is_seen_around_a_wide_garment(tmp_path):
    pixels = np.full((100, 100), 240, np.uint8)
    pixels[45:88, 1:99] = 60
    found = read(tmp_path, pixels) > 0
    assert (found.any(axis=1).sum(), found.any(axis=0).sum()) == (13, 28)  # of 43 and 98


def is_refused(path, reason):
    with pytest.raises(UserError, match=reason) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    Image.fromarray(GARMENT).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    header = whole[:16] + struct.pack(">II", 30_000, 30_000) + whole[24:29]
    bomb = header + struct.pack(">I", zlib.crc32(header[12:])) + whole[33:]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")  # Ghostscript would run it
    program = (tmp_path / "a.eps").read_bytes()
    for content in (whole[:-40], bomb, program):
        (tmp_path / "a.png").write_bytes(content)
        is_refused(tmp_path / "a.png", "cannot be read .*: export it as PNG or JPEG")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("missing.png", "pipe.png"):
        is_refused(tmp_path / name, "is not a file")


def test_a_picture_without_a_garment_is_refused(tmp_path):
    path = tmp_path / "a.tiff"
    Image.new("RGBA", (9, 9)).save(path)
    is_refused(path, "transparent all over")
    tiles = (np.indices((64, 64)) // 8).sum(axis=0) % 2
    for pixels in (np.full((9, 9), 77), 120 + 8 * tiles):
        Image.fromarray(np.uint8(pixels)).save(path)
        is_refused(path, "of one even colour")


@pytest.mark.parametrize(
    "kind, least",
    [
        ("coloured paper", 0.9),
        ("vignette of 25 %", 0.9),
        ("noise of 0.06", 0.85),
        ("black bars at the sides, 14 %", 0.9),
        ("wall and floor", 0.8),
        ("wood", 0.92),
        ("grass", 0.94),
    ],
)
def test_a_garment_is_found_on_every_kind_of_background(test_split, tmp_path, kind, least):
    overlaps = []
    for i in (1, 2, 7):  # a Pullover, a Trouser, a Shirt
        image = test_split[0][i, 0].numpy()
        large = np.pad(image.repeat(10, 0).repeat(10, 1), 60)
        expected = read(tmp_path, 255 - large) > 0
        picture = photograph(image, kind, np.random.default_rng(i))
        cv2.setRNGSeed(i)  # other pictures use up OpenCV's random numbers
        found = read_back(picture, tmp_path)
        cv2.setRNGSeed(i + 1)
        assert np.array_equal(read_back(picture, tmp_path), found)
        overlaps.append(((found > 0) & expected).sum() / ((found > 0) | expected).sum())
    assert np.mean(overlaps) > least


def test_a_crumb_beside_the_garment_does_not_count(tmp_path):
    pixels = np.full((300, 300), 240, np.uint8)
    pixels[60:200, 80:180] = 50
    image = read(tmp_path, pixels)
    pixels[270:278, 20:28] = 30
    assert np.array_equal(read(tmp_path, pixels), image)
    pixels[250:290, 10:60] = 30  # a seventh of the garment's area: a part of it, as the other shoe
    assert np.abs(read(tmp_path, pixels) - image).max() > 50


def test_the_photograph_is_kept_as_a_person_sees_it(tmp_path):
    picture = Image.new("RGBA", (1500, 900), (0, 0, 0, 0))
    picture.paste((200, 10, 20, 255), (300, 200, 900, 700))
    picture.save(tmp_path / "a.png")
    _, seen = read_image(tmp_path / "a.png")
    assert seen.shape == (307, 512, 3) and seen.dtype == np.uint8
    assert seen[0, 0].tolist() == [255, 255, 255] and seen[150, 200].tolist() == [200, 10, 20]
