"""Where the objects of a scene are: geometry that makes the stated size, position and relation true and visible.

Lengths are fractions of the picture side; x to the right, y downwards.
"""

from types import MappingProxyType

import numpy as np

from vision_moe.data.scene_factors import Factors, Only, Scene, SceneObject, sample_factors

SMALL_RADIUS = (0.107, 0.114)
LARGE_RADIUS = (0.147, 0.155)
OTHER_RADIUS = (0.100, 0.108)
MARGIN = 0.012
GAP = 0.02
# The center of a group "on the left" lies left of this, mirrored for the other sides; "in the center" within the band.
SIDE = 0.38
CENTER_BAND = (0.40, 0.60)
_MAX_TILT_DEGREES = 9.0
# The other object is never further off than this, so that the two kinds read as one composition.
_MAX_DISTANCE = 0.22

_Grid = tuple[tuple[float, float], ...]
_GRIDS: tuple[tuple[_Grid, ...], ...] = (
    (((0, 0),),),
    (((-0.5, 0), (0.5, 0)), ((0, -0.5), (0, 0.5))),
    (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, -1), (0, 0), (0, 1)),
        ((0, -0.5), (-0.5, 0.5), (0.5, 0.5)),
        ((-0.5, -0.5), (0.5, -0.5), (0, 0.5)),
    ),
    (((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)), ((0, -0.5), (-1, 0), (1, 0), (0, 0.5))),
)


def sample_scene(seed: int, split: str, index: int, only: Only = MappingProxyType({})) -> Scene:
    """Draw scene `index` of a split; the same arguments always give the same scene."""
    rng = np.random.default_rng([seed, 1 if split == "test" else 0, index])
    factors = sample_factors(rng, split, only)
    return Scene(factors=factors, objects=place(factors, rng), style_seed=int(rng.integers(2**31)))


def place(factors: Factors, rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Place the main group and the other object (last) so that all factors hold; nothing overlaps or is cut off."""
    radius = float(rng.uniform(*(LARGE_RADIUS if factors.size == "large" else SMALL_RADIUS)))
    other_radius = float(rng.uniform(*OTHER_RADIUS))
    pitch = 2 * radius + GAP
    fitting = []
    for grid in _GRIDS[factors.number - 1]:
        half_x, half_y = (max(abs(p[axis]) for p in grid) * pitch + radius for axis in (0, 1))
        x_range = _center_range(factors, "x", half_x, other_radius)
        y_range = _center_range(factors, "y", half_y, other_radius)
        if x_range[0] <= x_range[1] and y_range[0] <= y_range[1]:
            fitting.append((grid, half_x, half_y, x_range, y_range))
    assert fitting, f"no layout holds {factors}"
    grid, half_x, half_y, x_range, y_range = fitting[int(rng.integers(len(fitting)))]
    x, y = float(rng.uniform(*x_range)), float(rng.uniform(*y_range))
    group = tuple(
        SceneObject(
            shape=factors.shape,
            color=factors.color,
            texture=factors.texture,
            x=x + dx * pitch,
            y=y + dy * pitch,
            radius=radius,
            rotation=float(rng.uniform(-_MAX_TILT_DEGREES, _MAX_TILT_DEGREES)),
        )
        for dx, dy in grid
    )
    return (*group, _place_other(factors, rng, (x, y), (half_x, half_y), other_radius))


def _center_range(factors: Factors, axis: str, half: float, other_radius: float) -> tuple[float, float]:
    """Return where the group's center may be on one axis; empty (low > high) if this layout does not fit."""
    low_side, high_side = ("left", "right") if axis == "x" else ("top", "bottom")
    low_relation, high_relation = ("left of", "right of") if axis == "x" else ("above", "below")
    low, high = CENTER_BAND
    if factors.position == low_side:
        low, high = 0.0, SIDE
    elif factors.position == high_side:
        low, high = 1 - SIDE, 1.0
    room = 2 * other_radius + GAP
    low = max(low, MARGIN + half + (room if factors.relation == low_relation else 0))
    high = min(high, 1 - MARGIN - half - (room if factors.relation == high_relation else 0))
    return low, high


def _place_other(
    factors: Factors,
    rng: np.random.Generator,
    center: tuple[float, float],
    half: tuple[float, float],
    radius: float,
) -> SceneObject:
    """Put the other object clear of the group on the side the relation names, level with the group's middle."""
    along, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[factors.relation]
    across = 1 - along
    edge = MARGIN + radius if sign < 0 else 1 - MARGIN - radius
    nearest = half[along] + GAP + radius
    farthest = min(nearest + _MAX_DISTANCE, abs(edge - center[along]))
    drift = half[across] / 2
    spot = [0.0, 0.0]
    spot[along] = center[along] + sign * float(rng.uniform(nearest, max(nearest, farthest)))
    level = center[across] + float(rng.uniform(-drift, drift))
    spot[across] = min(max(level, MARGIN + radius), 1 - MARGIN - radius)
    return SceneObject(
        shape=factors.other_shape,
        color=factors.other_color,
        texture="solid",
        x=spot[0],
        y=spot[1],
        radius=radius,
        rotation=float(rng.uniform(-_MAX_TILT_DEGREES, _MAX_TILT_DEGREES)),
    )
