"""Drawing a scene: anti-aliased objects with texture, light and shadow over a background.

Each object is drawn on a tile `_OVERSAMPLE` times too large and averaged down, at its exact sub-pixel place.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from vision_moe.data.scene_backgrounds import draw_background
from vision_moe.data.scene_factors import Scene, SceneObject

MIN_IMAGE_SIZE = 64
MAX_IMAGE_SIZE = 336

_RGB = tuple[int, int, int]
_OVERSAMPLE = 4
_COLORS: dict[str, _RGB] = {
    "red": (222, 34, 38),
    "orange": (248, 130, 16),
    "yellow": (250, 220, 40),
    "green": (30, 172, 60),
    "cyan": (40, 214, 222),
    "blue": (34, 76, 222),
    "purple": (146, 50, 200),
    "pink": (252, 130, 184),
}
# The second tone of a texture is white on these and a deep shade on the lighter colors.
_DARK_COLORS = frozenset({"red", "green", "blue", "purple"})


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw a scene as an RGB picture of image_size x image_size pixels; deterministic.

    Raises:
        ValueError: if image_size is outside 64 to 336 pixels.
    """
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size must be in [{MIN_IMAGE_SIZE}, {MAX_IMAGE_SIZE}], but got {image_size}")
    rng = np.random.default_rng(scene.style_seed)
    picture = draw_background(scene.factors.background, image_size, rng)
    brightness, stripe_angle = float(rng.uniform(0.92, 1.04)), float(rng.uniform(-0.5, 0.5))
    light = (float(rng.uniform(-0.1, 0.1)), float(rng.uniform(0.08, 0.16)))
    tiles = [_draw_tile(thing, image_size, brightness, stripe_angle) for thing in scene.objects]
    for thing, (corner, tile) in zip(scene.objects, tiles, strict=True):
        _cast_shadow(picture, tile, corner, light, thing.radius * image_size)
    for corner, tile in tiles:
        picture.paste(tile, corner, tile)
    return picture


def _draw_tile(
    thing: SceneObject, image_size: int, brightness: float, stripe_angle: float
) -> tuple[tuple[int, int], Image.Image]:
    """Return an object's RGBA tile in picture pixels, and the tile's upper left corner in the picture."""
    radius = thing.radius * image_size
    reach = math.ceil(1.4 * radius) + 1
    column, row = int(thing.x * image_size), int(thing.y * image_size)
    side = 2 * reach * _OVERSAMPLE
    center = (
        (thing.x * image_size - column + reach) * _OVERSAMPLE,
        (thing.y * image_size - row + reach) * _OVERSAMPLE,
    )
    r = radius * _OVERSAMPLE
    main = tuple(min(255, round(c * brightness)) for c in _COLORS[thing.color])
    outline = tuple(round(c * 0.42) for c in main)
    mask = Image.new("L", (side, side), 0)
    tile = Image.new("RGB", (side, side), outline)
    _draw_shape(ImageDraw.Draw(mask), thing, center, r, fill=255, line=255)
    tile.paste(_texture(thing, main, side, center, r, stripe_angle), (0, 0), mask)
    _draw_shape(ImageDraw.Draw(tile), thing, center, r, fill=None, line=outline)
    tile.putalpha(mask)
    return (column - reach, row - reach), tile.reduce(_OVERSAMPLE)


def _texture(
    thing: SceneObject, main: tuple[int, ...], side: int, center: tuple[float, float], r: float, angle: float
) -> Image.Image:
    """Paint a square of the object's texture, lit from above; lengths in oversampled pixels."""
    axis = np.arange(side, dtype=np.float32) + 0.5
    x, y = (axis[None, :] - center[0]) / r, (axis[:, None] - center[1]) / r
    base = np.asarray(main, dtype=np.float32)
    light = 1.1 - 0.13 * (1 + np.clip(y, -1, 1))
    if thing.texture == "solid":
        pixels = np.broadcast_to(light[..., None] * base, (side, side, 3))
    else:
        second = base + 0.9 * (255 - base) if thing.color in _DARK_COLORS else base * 0.33
        share = _pattern(thing.texture, x, y, angle)[..., None]
        pixels = light[..., None] * (base + share * (second - base))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _pattern(texture: str, x: NDArray[np.float32], y: NDArray[np.float32], angle: float) -> NDArray[np.float32]:
    """Return the share of the second tone, float[side, side] of 0 or 1; x and y in object radii."""
    if texture == "striped":
        # Slanted around 45 degrees, so that stripes follow no edge of a shape.
        slant = angle + math.pi / 4
        along = math.cos(slant) * x + math.sin(slant) * y
        return (np.floor(along / 0.36 + 0.5) % 2).astype(np.float32)
    if texture == "checkered":
        return ((np.floor(x / 0.46) + np.floor(y / 0.46)) % 2).astype(np.float32)
    if texture == "dotted":
        pitch = 0.54
        y = y + pitch / 2
        row = np.round(y / pitch)
        # Every second row is shifted, as on polka dots.
        shifted = x / pitch + 0.5 * (row % 2)
        off_x, off_y = shifted - np.round(shifted), y / pitch - row
        return (off_x**2 + off_y**2 < 0.31**2).astype(np.float32)
    raise ValueError(f"unknown texture {texture!r}")


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    thing: SceneObject,
    center: tuple[float, float],
    r: float,
    *,
    fill: int | None,
    line: int | tuple[int, ...],
) -> None:
    """Draw the shape's body (unless fill is None) and its outline; lengths in oversampled pixels."""
    width = max(_OVERSAMPLE, round(0.09 * r))
    if thing.shape in ("circle", "ring"):
        box = _box(center, 0.95 * r)
        draw.ellipse(box, fill=fill, outline=line, width=width)
        if thing.shape == "ring":
            hole = _box(center, 0.42 * r)
            draw.ellipse(hole, fill=0 if fill is not None else None, outline=line, width=width)
        return
    turn = math.radians(thing.rotation)
    cos, sin = math.cos(turn) * r, math.sin(turn) * r
    points = [(center[0] + cos * x - sin * y, center[1] + sin * x + cos * y) for x, y in _corners(thing.shape)]
    if fill is not None:
        draw.polygon(points, fill=fill)
    draw.line([*points, *points[:2]], fill=line, width=width, joint="curve")


def _box(center: tuple[float, float], r: float) -> tuple[float, float, float, float]:
    return center[0] - r, center[1] - r, center[0] + r, center[1] + r


def _corners(shape: str) -> list[tuple[float, float]]:
    """Return the outline of a shape within the unit circle, y downwards."""
    if shape == "square":
        return [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    if shape == "triangle":
        return [(0.0, -0.95), (0.95, 0.72), (-0.95, 0.72)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.74, 0.0), (0.0, 1.0), (-0.74, 0.0)]
    if shape == "cross":
        a, b = 0.34, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "star":
        spokes = [(0.47 if k % 2 else 1.04, math.pi * (k / 5 - 0.5)) for k in range(10)]
        return [(length * math.cos(turn), length * math.sin(turn) + 0.06) for length, turn in spokes]
    if shape == "heart":
        turns = [2 * math.pi * k / 40 for k in range(40)]
        curve = [(16 * math.sin(t) ** 3, _heart_height(t)) for t in turns]
        return [(x / 16.5, -(y + 2.5) / 16.5) for x, y in curve]
    raise ValueError(f"unknown shape {shape!r}")


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def _cast_shadow(
    picture: Image.Image,
    tile: Image.Image,
    corner: tuple[int, int],
    light: tuple[float, float],
    radius: float,
) -> None:
    """Darken the picture under an object's shadow, blurred and moved by `light` (in radii)."""
    mask = tile.getchannel("A").filter(ImageFilter.GaussianBlur(0.1 * radius)).point(lambda a: round(a * 0.38))
    spot = (corner[0] + round(light[0] * radius), corner[1] + max(1, round(light[1] * radius)))
    picture.paste((0, 0, 0), (*spot, spot[0] + tile.width, spot[1] + tile.height), mask)
