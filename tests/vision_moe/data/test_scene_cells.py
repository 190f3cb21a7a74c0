"""A scene as a page of words: each cell names what a person would see there."""

from dataclasses import replace

from vision_moe.data.scene_cells import cells_in_words
from vision_moe.data.scene_factors import SceneObject
from vision_moe.data.scene_layout import sample_scene


def test_cells_name_the_object_over_their_center_and_the_background_elsewhere():
    scene = sample_scene(0, "train", 0)
    # Centers of cells lie at 1/16, 3/16, ...; this circle holds those of the four cells around (1/4, 1/4).
    star = SceneObject(shape="star", color="red", texture="solid", x=0.25, y=0.25, radius=0.1, rotation=0.0)
    factors = replace(scene.factors, background="sky")
    page = cells_in_words(replace(scene, factors=factors, objects=(star,))).replace("red star", "X").split()
    rows = ["".join("X" if word == "X" else "." for word in page[8 * row : 8 * row + 8]) for row in range(8)]
    assert rows == ["........", ".XX.....", ".XX.....", *["........"] * 5]
    assert set(page) == {"X", "sky"}


def test_every_object_of_a_scene_is_seen_somewhere():
    for index in range(200):
        scene = sample_scene(0, "train", index)
        page = cells_in_words(scene)
        assert all(f"{thing.color} {thing.shape}" in page for thing in scene.objects)
