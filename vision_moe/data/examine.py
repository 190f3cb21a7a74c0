"""What there is to say about one picture and its captions, readable or not."""

import hashlib
import io
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from vision_moe.data.caption_fields import captions_of
from vision_moe.data.picture import RefusedPictureError, decode
from vision_moe.data.read_config import ReadConfig, all_fields
from vision_moe.data.samples import RawSample


class Finding(NamedTuple):
    """One picture, examined."""

    name: str
    kind: str | None = None
    """"no picture", "damaged picture", "refused picture", "caption" or "damaged shard"; None if readable."""
    reason: str = ""
    """The fault in words."""
    form: str = ""
    """File format and mode, as "JPEG RGB"."""
    size: tuple[int, int] = (0, 0)
    """Width and height before rotation."""
    traits: tuple[str, ...] = ()
    """What decoding will change: "rotated by EXIF", "transparent", "animated"."""
    digest: int = 0
    """Hash of the encoded picture."""
    captions: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    """Keys of the metadata that hold something."""


def examine(raw: RawSample, config: ReadConfig) -> Finding:
    """Decodes a picture and finds its captions."""
    found: dict[str, Any] = {
        "name": raw.name,
        "fields": tuple(key for key, value in raw.metadata.items() if value not in (None, "", [])),
    }
    try:
        encoded = raw.encoded()
        found["digest"] = digest(encoded)
        found |= _header(encoded)
        decode(encoded, config.max_pixels)
        found["captions"] = tuple(captions_of(raw.metadata, all_fields(config), raw.name))
    except FileNotFoundError as error:
        return Finding(**found, kind="no picture", reason=str(error))
    except RefusedPictureError as error:
        return Finding(**found, kind="refused picture", reason=str(error))
    except OSError as error:
        return Finding(**found, kind="damaged picture", reason=str(error))
    except ValueError as error:
        return Finding(**found, kind="caption", reason=str(error))
    return Finding(**found)


def digest(content: bytes) -> int:
    """64 bits that equal contents share; among ten million others, two collide with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _header(encoded: bytes) -> dict[str, Any]:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            traits = {
                "rotated by EXIF": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
                "transparent": image.has_transparency_data,
                "animated": getattr(image, "is_animated", False),
            }
            form = f"{image.format} {image.mode}"
            return {"form": form, "size": image.size, "traits": tuple(name for name, has in traits.items() if has)}
    except Exception:
        # Whatever a damaged file makes Pillow raise here, `decode` meets it again and says it.
        return {}
