"""A scene as a page of words: what is seen in each cell of a grid, row by row, as a vision tower's patches see it."""

import math

from vision_moe.data.scene_factors import Scene

CELLS_PER_SIDE = 8


def cells_in_words(scene: Scene) -> str:
    """Name each of the 8 x 8 cells by the object at its center (`red star`), or else by the background.

    A language model that has read such pages knows how to look something up in a picture's tokens.
    """
    return " ".join(
        _seen_at(scene, (column + 0.5) / CELLS_PER_SIDE, (row + 0.5) / CELLS_PER_SIDE)
        for row in range(CELLS_PER_SIDE)
        for column in range(CELLS_PER_SIDE)
    )


def _seen_at(scene: Scene, x: float, y: float) -> str:
    """Objects do not touch, so at most one circumcircle holds the point."""
    for thing in scene.objects:
        if math.hypot(thing.x - x, thing.y - y) < thing.radius:
            return f"{thing.color} {thing.shape}"
    return scene.factors.background
