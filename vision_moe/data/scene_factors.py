"""The world of Scenes: eight independent factors, their values, and the sampling of one scene from a seed.

A scene holds a main group of `count` identical objects and one other object of another shape and another
color. The factors describe the main group, except `relation` (where the other object is, seen from the group)
and `background`. All lengths are fractions of the picture side, x to the right and y downwards.

Splits: shape, color and background have eight values each, and a triple of them belongs to the test split iff
its indices sum to 0 mod 8. This is a Latin square: every value and every pair of values is equally frequent in
either split, while no triple (hence no full combination) of the test split ever occurs in training, whatever
the seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three", "four")
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "black", "gray", "sand", "sky", "grass", "night", "wood")

FACTOR_VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "color": COLORS,
        "texture": TEXTURES,
        "size": SIZES,
        "count": COUNTS,
        "position": POSITIONS,
        "relation": RELATIONS,
        "background": BACKGROUNDS,
    }
)
SPLITS = ("train", "test")
# By factor: the values that the main group, its place and the background may take; a factor not named takes all.
Only = Mapping[str, Sequence[str]]

# A group at the left edge leaves no room for an object left of it.
_IMPOSSIBLE = frozenset({("left", "left of"), ("right", "right of"), ("top", "above"), ("bottom", "below")})
# One in 1,000 scenes fits the rarest values that make sense.
_MAX_DRAWS = 100_000
_PLACES = tuple((p, r) for p in POSITIONS for r in RELATIONS if (p, r) not in _IMPOSSIBLE)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a caption can say of a scene; every value is a word of `FACTOR_VALUES`."""

    shape: str
    color: str
    texture: str
    size: str
    count: str
    position: str
    relation: str
    background: str
    other_shape: str
    other_color: str

    def value(self, factor: str) -> str:
        """Return the value of one of the eight factors."""
        return str(getattr(self, factor))

    def as_dict(self) -> dict[str, str]:
        """Return the eight factors by name."""
        return {name: self.value(name) for name in FACTOR_VALUES}

    @property
    def number(self) -> int:
        """The number of objects in the main group, 1 to 4."""
        return COUNTS.index(self.count) + 1

    def alternatives(self, factor: str) -> tuple["Factors", ...]:
        """Return the scenes that differ in this factor alone and could be drawn.

        The other object keeps its shape and color, so the group may take neither: a caption that no picture fits would
        give itself away without the picture.

        Raises:
            ValueError: if the factor is unknown.
        """
        if factor not in FACTOR_VALUES:
            raise ValueError(f"unknown factor {factor!r}; choose one of: {', '.join(FACTOR_VALUES)}")
        changed = (replace(self, **{factor: v}) for v in FACTOR_VALUES[factor] if v != self.value(factor))
        return tuple(f for f in changed if f.is_possible())

    def is_possible(self) -> bool:
        """Whether the two kinds differ in shape and in color, and the relation fits on the picture."""
        kinds_differ = self.shape != self.other_shape and self.color != self.other_color
        return kinds_differ and (self.position, self.relation) not in _IMPOSSIBLE


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object as it is drawn: center and circumradius as fractions of the picture side, rotation in degrees."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture before it is drawn; the last object is the other one, those before it are the main group."""

    factors: Factors
    objects: tuple[SceneObject, ...]
    style_seed: int
    """Seeds all that no factor names: grain, gradients, clouds, shades, and the phrasing of captions."""


def split_of(shape: str, color: str, background: str) -> str:
    """Return the split, `train` or `test`, that owns this combination of values."""
    total = SHAPES.index(shape) + COLORS.index(color) + BACKGROUNDS.index(background)
    return "test" if total % len(BACKGROUNDS) == 0 else "train"


def sample_factors(rng: np.random.Generator, split: str, only: Only = MappingProxyType({})) -> Factors:
    """Draw the factors of one scene of a split; all values are equally likely but for the place.

    Place is drawn uniformly from the 16 possible pairs of position and relation. Scenes with other values than those of
    `only` are drawn again.

    Raises:
        ValueError: if the split is unknown, or it has no scene of these values.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    for _ in range(_MAX_DRAWS):
        factors = _sample_factors(rng, split)
        if all(factors.value(name) in values for name, values in only.items()):
            return factors
    raise ValueError(f"the {split} split has no scene, or almost none, with only {dict(only)}; allow more values")


def _sample_factors(rng: np.random.Generator, split: str) -> Factors:
    shape, color = int(rng.integers(8)), int(rng.integers(8))
    owned = [b for b in BACKGROUNDS if split_of(SHAPES[shape], COLORS[color], b) == split]
    position, relation = _PLACES[int(rng.integers(len(_PLACES)))]
    return Factors(
        shape=SHAPES[shape],
        color=COLORS[color],
        texture=TEXTURES[int(rng.integers(4))],
        size=SIZES[int(rng.integers(2))],
        count=COUNTS[int(rng.integers(4))],
        position=position,
        relation=relation,
        background=owned[int(rng.integers(len(owned)))],
        other_shape=SHAPES[(shape + int(rng.integers(1, 8))) % 8],
        other_color=COLORS[(color + int(rng.integers(1, 8))) % 8],
    )
