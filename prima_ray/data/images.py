"""Photos from strangers -> upright 8-bit RGB, within bounds. Pure functions, no torch.

Nothing is decoded before its size is known, and only JPEG and PNG are opened at all.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from prima_ray.data.rejection import RecordRejected

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000
_JFIF, _ADOBE = b"JFIF\0", b"Adobe"
_APP0, _APP14, _COMMENT, _START_OF_SCAN, _END = 0xE0, 0xEE, 0xFE, 0xDA, 0xD9
_DECODING = frozenset({0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, _START_OF_SCAN})
"""JPEG segments without which there is no picture: frames, Huffman and quantisation tables, restarts, scans."""
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_EIGHT_OF_SIXTEEN = np.round(np.arange(65536) / 257).astype(np.uint8)


class ImageRejected(RecordRejected):
    """A photo that cannot be used."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, draft_side: int | None = None) -> Image.Image:
    """Decode one photo: upright by its EXIF orientation, 8-bit RGB.

    Args:
        max_pixels: a photo with more is rejected before it is decoded.
        draft_side: a JPEG may be decoded at a reduced size whose shorter side is still at least this (2-3 times
            faster for large photos).

    Raises:
        ImageRejected: `empty_file`, `not_an_image`, `too_many_pixels` or `truncated_image`.
    """
    image = _bounded(data, max_pixels)
    if draft_side is not None and image.format == "JPEG":
        # PIL picks the largest reduction whose size is still no smaller than asked on both sides.
        width, height = image.size
        scale = draft_side / min(width, height)
        if scale < 1:
            image.draft(image.mode, (max(1, int(width * scale)), max(1, int(height * scale))))
    try:
        image.load()
        image = _to_rgb(_to_srgb(_upright(image)))
    except Exception as error:
        # PIL's parsers raise whatever a broken file makes of their assumptions: struct.error, KeyError, zlib.error.
        raise ImageRejected("truncated_image", str(error) or type(error).__name__) from None
    # Nothing of the file but its pixels goes on: PIL would write a comment into the next file.
    image.info.clear()
    return image


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a photo by its header; nothing is decoded, so it may still be damaged.

    Raises:
        ImageRejected: see `decode_image`.
    """
    return _bounded(data, max_pixels).size


def _bounded(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageRejected("empty_file", "0 bytes")
    image = _open(data, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected("too_many_pixels", f"{width} x {height} pixels, at most {max_pixels} are read")
    return image


def _open(data: bytes, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # PIL's own limit warns; ours, on the size, decides. And of damaged EXIF nobody needs to hear.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ImageRejected(
                "too_many_pixels", f"more than {limit} pixels, at most {min(limit, max_pixels)} are read"
            ) from None
        except UnidentifiedImageError:
            raise ImageRejected("not_an_image", f"neither JPEG nor PNG ({len(data)} bytes)") from None
        except Exception as error:
            raise ImageRejected("truncated_image", str(error) or type(error).__name__) from None


def _upright(image: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        # A damaged EXIF block says nothing about orientation; the photo itself may be fine.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return ImageOps.exif_transpose(image)
        except Exception:
            return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """The colours of another profile, Display P3 say, as sRGB, which is what a picture without a profile is."""
    profile = image.info.get("icc_profile")
    if image.mode != "RGB" or not profile or is_srgb(profile):
        return image
    try:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        # A damaged profile says nothing about colours.
        return image
    return converted or image


def is_srgb(profile: bytes) -> bool:
    """True for a colour profile that calls itself sRGB."""
    try:
        return "sRGB" in ImageCms.getProfileDescription(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # 16-bit grey: PIL's own conversion cuts at 255 instead of scaling.
        image = Image.fromarray(_EIGHT_OF_SIXTEEN[np.clip(np.asarray(image), 0, 65535).astype(np.uint16)])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # What is transparent shows white, as on a page.
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def encode_image(image: Image.Image, *, max_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """JPEG bytes without EXIF, and their width and height in pixels; shrunk to ``max_side`` where longer."""
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), image.width, image.height


def bare_jpeg(data: bytes) -> bytes | None:
    """A JPEG's coded picture as it is, without application segments, comments, or bytes after its end.

    Of the application segments those stay that say how to read the colours: JFIF, without its thumbnail, and Adobe.

    Returns:
        None where the file is unusual; its picture must then be encoded anew.
    """
    try:
        return b"".join(_bare_segments(data))
    except _UnusualJpegError:
        return None


class _UnusualJpegError(ValueError):
    pass


def _bare_segments(data: bytes) -> Iterator[bytes]:
    yield b"\xff\xd8"
    seen: set[int] = set()
    at = 2
    while True:
        found = _MARKER.match(data, at)
        if found is None:
            raise _UnusualJpegError
        marker, at = found[1][0], found.end()
        if marker == _END:
            yield b"\xff\xd9"
            return
        body = data[at + 2 : at + int.from_bytes(data[at : at + 2])]
        at += 2 + len(body)
        if (marker, body[:5]) in ((_APP0, _JFIF), (_APP14, _ADOBE)):
            # Of two a reader might follow either.
            if marker in seen or len(body) < 12:
                raise _UnusualJpegError
            seen.add(marker)
            yield _segment(marker, body[:12] + b"\0\0" if marker == _APP0 else body[:12])
        elif marker in _DECODING:
            yield _segment(marker, body)
        elif not (_APP0 <= marker < _APP0 + 16 or marker == _COMMENT):
            raise _UnusualJpegError
        if marker == _START_OF_SCAN:
            after = _AFTER_SCAN.search(data, at)
            if after is None:
                raise _UnusualJpegError
            yield data[at : after.start()]
            at = after.start()


def _segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + body
