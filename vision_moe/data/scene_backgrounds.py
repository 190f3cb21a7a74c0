"""The eight backgrounds of Scenes, drawn as float RGB fields.

Grain lives on grids of fixed size that are scaled to the picture, so a scene looks alike at every image size.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float32]


def draw_background(name: str, image_size: int, rng: np.random.Generator) -> Image.Image:
    """Draw one background as an RGB picture of image_size x image_size pixels."""
    pixels_HWC = _PAINTERS[name](image_size, rng)
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def _noise(size: int, rng: np.random.Generator, rows: int, columns: int) -> Field:
    """Return smooth noise float[size, size] of unit variance on the grid, from rows x columns random values."""
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _ramp(size: int, angle: float) -> Field:
    """Return a linear gradient float[size, size] from about -1 to 1 along an angle in radians."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]).astype(np.float32)


def _mix(share_HW: Field, low: tuple[int, int, int], high: tuple[int, int, int]) -> Field:
    """Blend two colors by a field of shares in [0, 1]."""
    start, end = np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)
    return start + np.clip(share_HW, 0, 1)[..., None] * (end - start)


def _plain(size: int, rng: np.random.Generator, low: int, high: int) -> Field:
    """A studio backdrop: gray levels between two bounds, a soft light from a random side, fine grain."""
    light = 0.5 + 0.3 * _ramp(size, rng.uniform(0, 2 * np.pi)) + 0.12 * _noise(size, rng, 5, 5)
    grain = rng.uniform(0.2, 1.6) * _noise(size, rng, 64, 64)
    return _mix(light, (low,) * 3, (high,) * 3) + grain[..., None]


def _white(size: int, rng: np.random.Generator) -> Field:
    return _plain(size, rng, 232, 255)


def _black(size: int, rng: np.random.Generator) -> Field:
    return _plain(size, rng, 6, 34)


def _gray(size: int, rng: np.random.Generator) -> Field:
    return _plain(size, rng, 112, 148)


def _sand(size: int, rng: np.random.Generator) -> Field:
    """Dunes: slanted soft waves and grain."""
    phase, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(7, 11)
    waves = np.sin(pitch * _ramp(size, rng.uniform(1.1, 2.0)) + 0.9 * _noise(size, rng, 4, 4) + phase)
    share = 0.5 + 0.26 * waves + 0.10 * _noise(size, rng, 64, 64)
    return _mix(share, (206, 178, 132), (238, 218, 178))


def _sky(size: int, rng: np.random.Generator) -> Field:
    """A vertical gradient with clouds."""
    height = 0.5 + 0.5 * _ramp(size, np.pi / 2)
    blue = _mix(height, (96, 160, 226), (188, 220, 246))
    cloud = _noise(size, rng, 5, 4) + 0.45 * _noise(size, rng, 11, 9) + 0.2 * _noise(size, rng, 24, 20)
    cover = np.clip((cloud - 0.35) * 0.9, 0, 0.85)[..., None]
    return blue + cover * (np.float32(250) - blue)


def _grass(size: int, rng: np.random.Generator) -> Field:
    """Blades: noise that is long vertically, over soft patches."""
    blades = _noise(size, rng, 18, 64)
    patches = _noise(size, rng, 5, 5)
    share = 0.5 + 0.2 * blades + 0.12 * patches + 0.1 * _ramp(size, np.pi / 2)
    return _mix(share, (38, 82, 34), (118, 160, 78))


def _night(size: int, rng: np.random.Generator) -> Field:
    """A dusk-to-midnight gradient with stars."""
    height = 0.5 + 0.5 * _ramp(size, np.pi / 2) + 0.08 * _noise(size, rng, 4, 4)
    pixels = _mix(height, (10, 14, 52), (62, 50, 122))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    spread = max(0.006, 0.35 / size)
    for x, y, glow in rng.uniform(size=(int(rng.integers(14, 26)), 3)):
        bump_x = np.exp(-(((axis - x) / spread) ** 2))
        bump_y = np.exp(-(((axis - y) / spread) ** 2))
        pixels += (90 + 150 * glow) * (bump_y[:, None] * bump_x[None, :])[..., None]
    return pixels


def _wood(size: int, rng: np.random.Generator) -> Field:
    """Horizontal planks with grain and dark joints."""
    planks = int(rng.integers(4, 7))
    row = np.linspace(0, planks, size, endpoint=False, dtype=np.float32) + np.float32(rng.uniform())
    shade = rng.uniform(-0.16, 0.16, planks + 1).astype(np.float32)[row.astype(np.int64)]
    grain = 0.16 * _noise(size, rng, 64, 6) + 0.08 * _noise(size, rng, 5, 5)
    pixels = _mix(0.5 + shade[:, None] + grain, (104, 66, 40), (166, 116, 74))
    joint = np.clip(1 - np.minimum(row % 1, 1 - row % 1) * size / planks / max(1.0, size / 90), 0, 1)
    return pixels * (1 - 0.45 * joint[:, None, None])


_PAINTERS = {
    "white": _white,
    "black": _black,
    "gray": _gray,
    "sand": _sand,
    "sky": _sky,
    "grass": _grass,
    "night": _night,
    "wood": _wood,
}
