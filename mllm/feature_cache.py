"""What the tower made of the last pictures, so that it sees each picture of a conversation once."""

import hashlib
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor


class FeatureCache:
    """Features of pictures by their pixels.

    Args:
        compute: pictures -> the features of each.
        size: pictures that are kept, the last ones that were asked for.
    """

    def __init__(self, compute: Callable[[Sequence[Image.Image]], list[Tensor]], size: int = 8) -> None:
        self.compute = compute
        self.size = size
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """The features of each picture; those of unknown ones are computed together."""
        keys = [_key(picture) for picture in pictures]
        # Another thread may throw out what this one has found.
        kept = dict(self._kept)
        unknown = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in kept}
        if unknown:
            kept |= zip(unknown, self.compute(list(unknown.values())), strict=True)
        latest = [key for key in kept if key not in keys] + list(dict.fromkeys(keys))
        self._kept = {key: kept[key] for key in latest[-self.size :]}
        return [kept[key] for key in keys]


def _key(picture: Image.Image) -> bytes:
    digest = hashlib.blake2b(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.convert("RGBA").tobytes() if picture.mode == "P" else picture.tobytes())
    return digest.digest()
