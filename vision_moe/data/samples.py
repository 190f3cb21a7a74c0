"""One picture with its metadata as it lies in a data set, undecoded."""

import json
from typing import Any, NamedTuple

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class RawSample(NamedTuple):
    """A picture that has not been decoded yet."""

    name: str
    """What to call it in messages."""
    picture: bytes | None
    """Encoded; None where there is none."""
    metadata: dict[str, Any]
    """JSON or row, without the picture."""
    error: str | None = None
    """Why the metadata could not be read."""

    def encoded(self) -> bytes:
        """The picture's bytes.

        Raises:
            FileNotFoundError: there are none.
            ValueError: the metadata could not be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if self.picture is None:
            raise FileNotFoundError(f"{self.name} has no picture")
        return self.picture


def key_and_suffix(path: str) -> tuple[str, str] | None:
    """Splits a file name in a shard at the first dot, as WebDataset does; None for hidden files.

    The suffix is in lower case and starts with its dot.
    """
    folder, slash, name = path.rpartition("/")
    if name.startswith((".", "__")):
        return None
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, f".{suffix.lower()}"


def metadata_of(json_text: bytes | None, text: bytes | None, where: str) -> dict[str, Any]:
    """The object in KEY.json, with KEY.txt under "txt"; either may be missing.

    Raises:
        ValueError: KEY.json is no JSON object, or a text is not UTF-8.
    """
    metadata = {} if json_text is None else json_object(json_text.decode("utf-8"), where)
    if text is not None:
        metadata["txt"] = text.decode("utf-8")
    return metadata


def json_object(text: str, where: str) -> dict[str, Any]:
    """Parses one JSON object.

    Raises:
        ValueError: the text is something else; the message names `where`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, but got {type(value).__name__}")
    return value
