"""Photos from strangers -> upright 8-bit RGB, within bounds. Pure functions, no torch.

Nothing is decoded before its size is known, and only JPEG and PNG are opened at all.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prima_ray.data.rejection import RecordRejected

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000
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
    if not data:
        raise ImageRejected("empty_file", "0 bytes")
    image = _open(data, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected("too_many_pixels", f"{width} x {height} pixels, at most {max_pixels} are read")
    if draft_side is not None and image.format == "JPEG":
        # PIL picks the largest reduction whose size is still no smaller than asked on both sides.
        scale = draft_side / min(width, height)
        if scale < 1:
            image.draft(image.mode, (max(1, int(width * scale)), max(1, int(height * scale))))
    try:
        image.load()
        image = _to_rgb(_upright(image))
    except Exception as error:
        # PIL's parsers raise whatever a broken file makes of their assumptions: struct.error, KeyError, zlib.error.
        raise ImageRejected("truncated_image", str(error) or type(error).__name__) from None
    # Nothing of the file but its pixels goes on: PIL would write a comment into the next file.
    image.info.clear()
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
