"""Pictures that tell nothing: what is still answered right comes from the language, and from the balance of questions.

A blank picture takes sight away, but a model may notice that it is none; another picture of the same task looks as
usual and shows something else.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image

Pictures = Literal["own", "blank", "shuffled"]


def blank(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """A picture of the same size in one color."""
    return Image.new("RGB", image.size, color)


def other_picture(
    image: Image.Image,
    documents: Sequence[Any],
    pictures_of: Callable[[Any], Sequence[Image.Image] | None],
    *,
    seed: int,
) -> Image.Image:
    """Another picture of the same task, the same one for every question about `image`.

    Where the search begins follows from the seed and from what the picture shows, and so depends neither on the order
    of the questions nor on how they are dealt out to processes.

    Args:
        image: the picture to replace.
        documents: of the task, all of them.
        pictures_of: a document -> its pictures.
        seed: another one gives other pictures.

    Raises:
        ValueError: no document has another picture.
    """
    own = pixels_sha256(image)
    start = int.from_bytes(hashlib.sha256(f"{seed} {own}".encode()).digest()[:8]) % len(documents)
    for step in range(len(documents)):
        for candidate in pictures_of(documents[(start + step) % len(documents)]) or ():
            if pixels_sha256(candidate) != own:
                return candidate.convert("RGB")
    raise ValueError(f"none of {len(documents)} documents has another picture, so they cannot be shuffled")


def pixels_sha256(image: Image.Image) -> str:
    """What a picture shows, whatever file it came from."""
    rgb = image.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
