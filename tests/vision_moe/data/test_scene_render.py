"""Drawing Scenes: size, repeatability, and colors, textures and shapes that can be seen."""

from dataclasses import replace

import numpy as np
import pytest

from vision_moe.data.scene_factors import BACKGROUNDS, COLORS, SHAPES, TEXTURES, Scene
from vision_moe.data.scene_layout import sample_scene
from vision_moe.data.scene_render import render


def _pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(render(scene, size)).astype(np.int64)


def _with_main(scene: Scene, **change: str) -> Scene:
    """The scene with the drawn main group changed, whatever the factors say."""
    *group, other = scene.objects
    return replace(scene, objects=(*(replace(thing, **change) for thing in group), other))


@pytest.fixture(scope="module")
def large_scene() -> Scene:
    """One large object, so that its pixels are found by its radius."""
    candidates = (sample_scene(0, "train", i) for i in range(500))
    return next(s for s in candidates if s.factors.count == "one" and s.factors.size == "large")


@pytest.mark.parametrize("size", [64, 100, 336])
def test_picture_is_rgb_of_the_size_asked_for(large_scene, size):
    picture = render(large_scene, size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))


@pytest.mark.parametrize("size", [63, 337])
def test_sizes_out_of_range_are_refused(large_scene, size):
    with pytest.raises(ValueError, match=rf"image_size must be in \[64, 336\], but got {size}"):
        render(large_scene, size)


def test_drawing_is_deterministic(large_scene):
    assert np.array_equal(_pixels(large_scene), _pixels(large_scene))


def test_a_scene_looks_alike_at_every_size(large_scene):
    small = _pixels(large_scene, 64)
    large = np.asarray(render(large_scene, 320).reduce(5)).astype(np.int64)
    assert np.abs(small - large).mean() < 6


def test_edges_are_anti_aliased(large_scene):
    black = replace(large_scene, factors=replace(large_scene.factors, background="white"))
    red = _pixels(_with_main(black, shape="circle", color="red", texture="solid"))
    thing = black.objects[0]
    y, x = np.mgrid[0:64, 0:64] + 0.5
    distance = np.hypot(x - thing.x * 64, y - thing.y * 64) / (thing.radius * 64)
    rim = red[(distance > 0.85) & (distance < 1.05)]
    assert len(np.unique(rim[:, 0])) > 10


@pytest.mark.parametrize("color", COLORS)
def test_a_solid_object_has_the_hue_of_its_name(large_scene, color):
    hues = {"red": 0, "orange": 30, "yellow": 52, "green": 133, "cyan": 183, "blue": 227, "purple": 279, "pink": 333}
    scene = _with_main(large_scene, shape="square", color=color, texture="solid")
    thing = scene.objects[0]
    hsv = np.asarray(render(scene, 64).convert("HSV")).astype(float)
    hue = hsv[int(thing.y * 64), int(thing.x * 64), 0] * 360 / 255
    assert min(abs(hue - hues[color]), 360 - abs(hue - hues[color])) < 8


@pytest.mark.parametrize("color", COLORS)
def test_textures_differ_by_many_gray_levels_within_the_smallest_object(color):
    candidates = (sample_scene(1, "train", i) for i in range(500))
    scene = next(s for s in candidates if s.factors.count == "one" and s.factors.size == "small")
    thing = scene.objects[0]
    reach = int(0.6 * thing.radius * 64)
    column, row = int(thing.x * 64), int(thing.y * 64)
    patches = {}
    for texture in TEXTURES:
        pixels = _pixels(_with_main(scene, shape="square", color=color, texture=texture))
        patches[texture] = pixels[row - reach : row + reach + 1, column - reach : column + reach + 1]
    for texture in TEXTURES[1:]:
        assert patches[texture].std(axis=(0, 1)).max() > 2 * patches["solid"].std(axis=(0, 1)).max()
        for other in TEXTURES[1:]:
            if other != texture:
                assert np.abs(patches[texture] - patches[other]).mean() > 15


def test_all_shapes_and_backgrounds_differ_visibly(large_scene):
    shapes = [_pixels(_with_main(large_scene, shape=shape, texture="solid")) for shape in SHAPES]
    grounds = [
        _pixels(replace(large_scene, factors=replace(large_scene.factors, background=name))) for name in BACKGROUNDS
    ]
    for pictures, least in ((shapes, 0.5), (grounds, 20.0)):
        for i, picture in enumerate(pictures):
            for other in pictures[:i]:
                assert np.abs(picture - other).mean() > least
