"""Encoded pictures of every kind, made upright 8-bit RGB."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vision_moe.data.read_config import MAX_PIXELS

# CLIP resizes the shorter edge to its input size: a picture of 1 x 20,000 pixels would become one of 224 x 4,480,000.
_MAX_ASPECT_RATIO = 100
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class RefusedPictureError(OSError):
    """A picture that is whole, but that training should not take."""


def decode(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture fully, to RGB as a person would see it.

    CLIP, open_clip and LLaVA call `.convert("RGB")` and no more. Where that shows something else than a viewer does,
    and so than the captioner saw, this differs: EXIF orientation is applied (as transformers' load_image and
    datasets.Image do), transparency is laid over white (convert shows what lies hidden under it), 16-bit grey is scaled
    to 8 bits (convert clips it to white). CMYK is converted by Pillow without color profile; of an animation the first
    frame counts.

    Args:
        encoded: a file that Pillow reads.
        max_pixels: width times height at most; checked before anything is unpacked.

    Raises:
        RefusedPictureError: too many pixels, more than 100 times longer than wide, or floating-point values.
        OSError: the bytes are no picture, or only part of one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_size(image.size, max_pixels)
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return _to_rgb(ImageOps.exif_transpose(image))
            return _to_rgb(image)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Damaged files make Pillow's plugins raise whatever their parsing comes upon: SyntaxError, struct.error, ...
        raise OSError(f"{type(error).__name__}: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise RefusedPictureError(f"{width} x {height} pixels; at most {max_pixels} in all (max_pixels)")
    if max(size) > _MAX_ASPECT_RATIO * min(size):
        raise RefusedPictureError(
            f"{width} x {height} pixels; the longer edge may be {_MAX_ASPECT_RATIO} times the other"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bits(image).convert("RGB")
    if image.mode == "F":
        raise RefusedPictureError("floating-point values (mode F): their range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    values_HW = np.asarray(image).astype(np.int64)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        low, high = values_HW.min(), values_HW.max()
        raise RefusedPictureError(f"values from {low} to {high} (mode {image.mode}), outside 16 bits")
    return Image.fromarray(((values_HW * 255 + 32767) // 65535).astype(np.uint8))
