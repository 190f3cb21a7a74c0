"""The pictures that users send: the only files that the demo reads for them, and within which limits."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vision_moe.data.picture import decode

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
_ADVICE = "Send a JPEG, PNG or WebP picture."


class Uploads:
    """The folder that the server keeps uploads in.

    Args:
        folder: everything below it may be read, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def holds(self, path: Path) -> bool:
        """Whether the file is there and lies in the folder, links followed."""
        resolved = path.resolve()
        return resolved.is_relative_to(self.folder) and resolved.is_file()

    def read(self, path: Path) -> Image.Image:
        """Decodes a picture completely, as a viewer would show it; what it is, its content says and not its name.

        Raises:
            ValueError: it lies elsewhere, is too large, of another format or damaged; the message is for the user.
        """
        # A path from elsewhere gets the same answer as one that does not exist.
        if not self.holds(path):
            raise ValueError(f"{path.name} was not uploaded here, or is no longer kept. Upload it again.")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{path.name} has {path.stat().st_size / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read."
            )
        encoded = path.read_bytes()
        try:
            # The header alone, and no format whose reader starts other programs.
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
                width, height = picture.size
        except UnidentifiedImageError:
            raise ValueError(f"Cannot read {path.name}: its content is not a known picture. {_ADVICE}") from None
        except Image.DecompressionBombError:
            raise ValueError(f"{path.name} unpacks to far more pixels than the {MAX_PIXELS:,} allowed.") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"Cannot read {path.name} ({error}). {_ADVICE}") from error
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{path.name} is {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} in all are read. "
                "Make it smaller."
            )
        try:
            return decode(encoded, MAX_PIXELS)
        except OSError as error:
            raise ValueError(f"Cannot read {path.name} ({error}). {_ADVICE}") from error
