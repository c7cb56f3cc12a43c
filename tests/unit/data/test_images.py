from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from prima_ray.data.images import ImageRejected, decode_image, encode_image
from tests.unit.raw_data_set import encoded, picture

RED_TOP = Image.fromarray(
    np.concatenate([np.full((8, 32, 3), (250, 0, 0)), np.full((16, 32, 3), (0, 0, 250))]).astype(np.uint8)
)


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A valid PNG of a few kilobytes: zeros compress well."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rejection(data: bytes, **options: int) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_image(data, **options)
    return str(caught.value)


def test_what_is_no_photo_is_said():
    jpeg = encoded(picture(1, 200, 150))
    assert rejection(b"") == "empty_file: 0 bytes"
    assert rejection(b"see attached letter") == "not_an_image: neither JPEG nor PNG (19 bytes)"
    assert rejection(encoded(picture(1), "GIF")).startswith("not_an_image: neither JPEG nor PNG (")
    assert rejection(encoded(picture(1), "TIFF")).startswith("not_an_image: ")
    assert rejection(jpeg[: len(jpeg) // 2]).startswith("truncated_image: image file is truncated")
    assert rejection(jpeg, max_pixels=1000) == "too_many_pixels: 200 x 150 pixels, at most 1000 are read"


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_bomb_is_turned_away_before_it_is_decoded(side: int):
    data = png_of_claimed_size(side, side)
    assert len(data) < 3000
    tracemalloc.start()
    text = rejection(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text.startswith("too_many_pixels: ")
    assert text.endswith("at most 50000000 are read")
    assert peak < 1_000_000


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_other_colour_models_become_rgb(mode: str):
    kind = "PNG" if mode in ("1", "P") else "JPEG"
    image = decode_image(encoded(RED_TOP.convert(mode), kind))
    assert (image.mode, image.size) == ("RGB", RED_TOP.size)
    if mode not in ("L", "1"):
        top, bottom = (np.array(image.getpixel((16, y))) for y in (3, 20))
        assert top[0] > top[2] + 90
        assert bottom[2] > bottom[0] + 90


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
    dim = decode_image(encoded(Image.fromarray(values // 257), "PNG"))
    assert np.asarray(dim)[0, :, 0].tolist() == [0, 0, 0, 1], "the scale is the format's, not the photo's"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photos_are_upright_and_their_exif_is_gone(orientation: int, kind: str):
    turned = RED_TOP
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for step in undo.get(orientation, []):
        turned = turned.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "Jane Doe"
    image = decode_image(encoded(turned, kind, exif=exif))
    assert image.size == RED_TOP.size
    pixels = np.asarray(image).astype(int)
    assert pixels[2, :, 0].min() > 180
    assert pixels[-2, :, 2].min() > 180
    data, *_ = encode_image(image, max_side=None, quality=92)
    assert b"Jane Doe" not in data
    assert not Image.open(io.BytesIO(data)).getexif()


def test_what_is_transparent_shows_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode_image(encoded(clear, "PNG"))).min() == 255
    grey = Image.new("LA", (4, 4), (0, 128))
    assert np.asarray(decode_image(encoded(grey, "PNG")))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (4, 4), 0)
    assert np.asarray(decode_image(encoded(palette, "PNG", transparency=0))).min() == 255


def test_the_first_frame_of_an_animation_is_the_photo():
    data = encoded(picture(1), "PNG", save_all=True, append_images=[picture(2)], default_image=False)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(picture(1)))


def test_one_pixel_is_a_photo():
    data, width, height = encode_image(decode_image(encoded(Image.new("RGB", (1, 1)))), max_side=16, quality=92)
    assert (width, height) == (1, 1)
    assert decode_image(data).size == (1, 1)


def test_comments_and_text_do_not_come_along():
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Jane Doe")
    for data in (encoded(picture(1), comment="Jane Doe"), encoded(picture(1), "PNG", pnginfo=info)):
        assert b"Jane Doe" in data
        assert b"Jane Doe" not in encode_image(decode_image(data), max_side=None, quality=92)[0]


def test_long_photos_are_shrunk_and_a_draft_is_not_too_small():
    data = encoded(picture(3, 800, 400))
    drafted = decode_image(data, draft_side=100)
    assert drafted.size == (200, 100)
    assert decode_image(data, draft_side=150).size == (400, 200)
    assert encode_image(drafted, max_side=50, quality=92)[1:] == (50, 25)
    assert drafted.size == (200, 100), "the argument stays as it is"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damage_of_any_kind_is_a_rejection_or_a_photo(kind: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(picture(4), kind, exif=exif)
    draw = random.Random(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            outcomes.add(decode_image(bytes(data)).mode)
        except ImageRejected as error:
            outcomes.add(error.reason)
    assert {"RGB", "truncated_image"} <= outcomes <= {"RGB", "truncated_image", "not_an_image", "too_many_pixels"}
