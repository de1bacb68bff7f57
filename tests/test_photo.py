"""A person's picture becomes 28x28: what comes out is worked out by hand."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from common.files import UserError

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
import cv2
from photographs import photograph, read_back, strange_pictures

from drawing.photo import read_image

# 40 pixels tall and 20 wide, one quarter of it darker: scaled by 0.7 it is 28 tall, 14 wide, and 7 from the left.
GARMENT = np.zeros((60, 60), np.uint8)
GARMENT[10:50, 15:35] = 200
GARMENT[10:20, 15:25] = 100
EXPECTED = np.zeros((28, 28), np.int64)
EXPECTED[:, 7:21] = 200
EXPECTED[:7, 7:14] = 100


@pytest.mark.parametrize(
    "garment, background, is_cut_out, expected",
    [
        (255, 230, False, 26),  # white on white: dark, as in the data set, but at least a tenth
        (200, 110, False, 55),  # as it would be on white: 255 - 200
        (200, 40, False, 190),  # on black, where garments are as light as the data set's: (200 - 40) / (255 - 40)
        (20, 110, False, 209),  # (110 - 20) / 110
        (0, 255, False, 255),
        (255, 0, True, 255),  # white and cut out: on black
        (0, 0, True, 255),  # black and cut out: on white
        (128, 0, True, 127),
    ],
)
def test_a_garment_may_be_lighter_or_darker_than_any_background(tmp_path, garment, background, is_cut_out, expected):
    pixels = np.where(GARMENT > 0, garment, background).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if is_cut_out:
        picture.putalpha(Image.fromarray(255 * (GARMENT > 0).astype(np.uint8)))
    picture.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")[0].astype(int)
    assert np.abs(found - np.where(EXPECTED > 0, expected, 0)).max() <= 1


def variants():
    """The garment in many kinds of files: what kind, the picture, the file's ending, and how to save it."""
    gray = Image.fromarray(GARMENT)
    sideways = Image.Exif()
    sideways[0x112] = 6  # the camera was held on its side: to be turned by 90 degrees
    cut_off = b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6"
    wide = Image.new("RGB", (90, 70), "white")
    wide.paste(Image.fromarray(255 - GARMENT).convert("RGB"), (30, 10))
    clear = Image.merge("LA", (Image.fromarray(255 - GARMENT), Image.fromarray(255 * (GARMENT > 0).astype(np.uint8))))
    yield "8 bits", gray, "png", {}
    yield "palette", gray.convert("P"), "gif", {}
    yield "moving", gray, "gif", dict(save_all=True, append_images=[gray.rotate(90)])
    yield "16 bits", Image.fromarray(GARMENT.astype(np.uint16) * 257), "png", {}
    yield "32 bits", Image.fromarray(GARMENT.astype(np.int32) * 257), "tiff", {}
    yield "floating point", Image.fromarray(GARMENT.astype(np.float32) / 255), "tiff", {}
    yield "floating point to 255", Image.fromarray(GARMENT.astype(np.float32)), "tiff", {}
    yield "CMYK", gray.convert("RGB").convert("CMYK"), "tiff", {}
    yield "off-centre, in colour, on white", wide, "png", {}
    yield "cut out", clear, "png", {}
    yield "turned by the camera", gray.rotate(90), "png", dict(exif=sideways)
    yield "JPEG with a damaged note", gray, "jpg", dict(exif=cut_off, quality=100)


@pytest.mark.parametrize("kind, picture, ending, options", [pytest.param(*case, id=case[0]) for case in variants()])
def test_files_of_every_kind_come_out_alike(tmp_path, kind, picture, ending, options):
    path = tmp_path / f"a.{ending}"
    picture.save(path, **options)
    found = read_image(path)[0].astype(int)
    assert found.shape == (28, 28) and np.abs(found - EXPECTED).max() <= (8 if ending == "jpg" else 1)


def test_16_bits_with_the_big_end_first(tmp_path):
    tags = [(256, 60), (257, 60), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 60), (279, 7200)]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    pixels = (GARMENT.astype(np.uint16) * 257).astype(">u2").tobytes()
    (tmp_path / "a.tiff").write_bytes(struct.pack(">2sHI", b"MM", 42, 8 + 7200) + pixels + directory + bytes(4))
    assert np.abs(read_image(tmp_path / "a.tiff")[0] - EXPECTED).max() <= 1


def test_a_large_picture_is_averaged_not_sampled(tmp_path):
    pixels = np.zeros((80, 80), np.uint8)
    pixels[12:68, 12:68] = np.random.default_rng(0).integers(100, 256, (56, 56))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels[12:68, 12:68].reshape(28, 2, 28, 2).mean(axis=(1, 3))
    assert np.abs(read_image(tmp_path / "a.png")[0] - means).max() < 0.51  # rounded


@pytest.mark.parametrize("haze, is_cut_away", [(9, True), (18, False)])  # CIELAB's lightness of them is 2.5 and 5.2
def test_what_is_as_faint_as_a_shadow_is_background(tmp_path, haze, is_cut_away):
    pixels = GARMENT.copy()
    pixels[10:50, 40:50] = haze
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")[0]
    assert np.array_equal(found, EXPECTED) == is_cut_away
    assert is_cut_away or (found[0, 2] == 100 and 20 < found[0, 25] <= 26)  # 35 wide: 24.5 pixels, from 2 on


def png(width, height):
    """A PNG file that says it is so large, and has no pixels."""
    pieces = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    chunks = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in pieces]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_no_picture_of_a_garment_is_refused_in_one_line(tmp_path):
    Image.fromarray(GARMENT).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    contents = {
        "empty.png": b"",
        "text.png": b"no picture",
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "cut.png": whole[: len(whole) * 3 // 4],
        "bomb.png": png(30_000, 30_000),
    }
    contents["photo.jpg"] = contents["photo.heic"]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(GARMENT).convert("RGB").save(tmp_path / "program.eps")
    Image.new("RGBA", (9, 9)).save(tmp_path / "clear.png")
    Image.new("L", (9, 9), 77).save(tmp_path / "even.png")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "missing.png": "is not a file",
        "": "is not a file",  # the folder
        "pipe.png": "is not a file",
        "c" * 300: "is not a file",
        "empty.png": "of a known format",
        "text.png": "of a known format",
        "photo.heic": "this is HEIC: export it as JPEG",
        "photo.jpg": "this is HEIC: export it as JPEG",
        "program.eps": "of a known format",  # Ghostscript would run it
        "cut.png": "cannot be read",
        "bomb.png": "too many pixels",
        "clear.png": "transparent all over",
        "even.png": "of one even colour",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as error:
            read_image(tmp_path / name)
            pytest.fail(f"{name} was read")
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    Image.fromarray(GARMENT).save(tmp_path / "a.avif", quality=100)
    assert np.abs(read_image(tmp_path / "a.avif")[0] - EXPECTED).max() <= 12


# ---- Backgrounds, simulated as benchmarks/photographs.py does -------------------------------------------------------

KINDS = {  # how much of the garment has to be found again, on average of three images, and whether there is a doubt
    "white": (0.9, False),
    "grey": (0.9, False),
    "coloured paper": (0.9, False),
    "gradient sideways, to 0.8": (0.9, False),
    "vignette of 25 %": (0.9, False),
    "noise of 0.06": (0.85, True),
    "frame of 2 pixels, black": (0.9, False),
    "black bars at the sides, 14 %": (0.9, False),
    "wall and floor": (0.8, True),
    "wood": (0.92, True),  # 0.90 without GrabCut
    "grass": (0.94, True),  # 0.90
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_garment_is_found_on_every_kind_of_background(test_split, tmp_path, kind):
    overlaps, notes = [], set()
    for i in (1, 2, 7):  # a Pullover, a Trouser, a Shirt
        image = test_split[0][i, 0].numpy()
        expected = read_back(255 - np.repeat(np.pad(image.repeat(10, 0).repeat(10, 1), 60)[..., None], 3, 2), tmp_path)[
            0
        ]
        found, note = read_back(photograph(image, kind, np.random.default_rng(i)), tmp_path)
        overlaps.append(((found > 0) & (expected > 0)).sum() / ((found > 0) | (expected > 0)).sum())
        notes.add(note != "")
    least, is_doubtful = KINDS[kind]
    assert np.mean(overlaps) > least and notes == {is_doubtful}


def test_a_picture_is_the_same_after_other_pictures(test_split, tmp_path):
    picture, images = photograph(test_split[0][1, 0].numpy(), "grass", np.random.default_rng(0)), []
    for seed in range(8):  # of OpenCV's random numbers, which other pictures use up
        cv2.setRNGSeed(seed)
        images.append(read_back(picture, tmp_path)[0])
    assert all(np.array_equal(image, images[0]) for image in images)


def test_a_crumb_beside_the_garment_does_not_count(tmp_path):
    picture = np.full((300, 300, 3), 240, np.uint8)
    picture[60:200, 80:180] = (90, 40, 40)
    image, _ = read_back(picture, tmp_path)
    picture[270:278, 20:28] = 30
    with_crumb, _ = read_back(picture, tmp_path)
    assert np.abs(with_crumb.astype(int) - image).max() <= 2
    picture[250:290, 10:60] = 30  # a seventh of the garment's area: a part of it, as the other shoe
    assert np.abs(read_back(picture, tmp_path)[0].astype(int) - image).max() > 50


def test_the_photograph_is_kept_as_a_person_sees_it(tmp_path):
    picture = Image.new("RGBA", (1500, 900), (0, 0, 0, 0))
    picture.paste((200, 10, 20, 255), (300, 200, 900, 700))
    picture.save(tmp_path / "a.png")
    _, seen, note = read_image(tmp_path / "a.png")
    assert seen.shape == (614, 1024, 3) and seen.dtype == np.uint8 and note == ""
    assert seen[0, 0].tolist() == [255, 255, 255] and seen[300, 400].tolist() == [200, 10, 20]


def test_strange_pictures_are_turned_drawn_cut_and_drawn_by_lot(test_split):
    images = test_split[0][:40]
    left, down, right, strokes, crops, noise = [*strange_pictures(images, np.random.default_rng(0)).values()][1:]
    for turned, quarters in ((left, 1), (down, 2), (right, 3)):
        assert np.array_equal(turned[5, 0], np.rot90(images[5, 0], quarters))
    lit = (strokes > 127).double().mean(dim=(1, 2, 3))
    assert 0.02 < lit.min() < lit.max() < 0.4 and (strokes[:, 0, 0] == 0).all()
    # A crop has no more values than its image has, give or take what enlarging it makes.
    assert (crops.amax(dim=(1, 2, 3)) <= images.amax(dim=(1, 2, 3))).all() and (crops.amin(dim=(2, 3)) > 0).any()
    assert noise.double().mean() == pytest.approx(127.5, abs=2) and noise.double().std() == pytest.approx(73.9, abs=2)
