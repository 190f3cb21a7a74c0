"""The world of Scenes: what is drawn, how often, in which split, and where on the picture."""

import itertools
from collections import Counter

import pytest

from vision_moe.data.scene_factors import BACKGROUNDS, COLORS, FACTOR_VALUES, SHAPES, Scene, split_of
from vision_moe.data.scene_layout import GAP, MARGIN, sample_scene

NUM = 1500


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [sample_scene(3, split, i) for i in range(NUM)] for split in ("train", "test")}


def _triple(scene: Scene) -> tuple[str, str, str]:
    f = scene.factors
    return f.shape, f.color, f.background


def test_no_combination_of_the_test_split_occurs_in_training(scenes):
    train, test = ({_triple(s) for s in scenes[split]} for split in ("train", "test"))
    assert not train & test
    assert all(split_of(*triple) == "train" for triple in train)
    assert all(split_of(*triple) == "test" for triple in test)


def test_every_pair_of_split_values_is_owned_by_both_splits_in_equal_number():
    owners = Counter()
    for shape, color, background in itertools.product(SHAPES, COLORS, BACKGROUNDS):
        split = split_of(shape, color, background)
        owners.update((split, *pair) for pair in itertools.combinations((shape, color, background), 2))
    assert {owners[key] for key in owners if key[0] == "train"} == {7}
    assert {owners[key] for key in owners if key[0] == "test"} == {1}
    assert len(owners) == 2 * 3 * 64


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("factor", FACTOR_VALUES)
def test_every_value_of_every_factor_is_about_equally_frequent(scenes, split, factor):
    counts = Counter(s.factors.value(factor) for s in scenes[split])
    assert set(counts) == set(FACTOR_VALUES[factor])
    # Position "center" goes with four relations, the others with three.
    share = {"left": 3 / 16, "right": 3 / 16, "top": 3 / 16, "bottom": 3 / 16, "center": 4 / 16}
    for value, count in counts.items():
        expected = NUM * (share[value] if factor == "position" else 1 / len(FACTOR_VALUES[factor]))
        # Five standard errors of a binomial count.
        assert abs(count - expected) < 5 * expected**0.5


def test_the_two_kinds_differ_in_shape_and_color(scenes):
    for scene in scenes["train"]:
        assert scene.factors.shape != scene.factors.other_shape
        assert scene.factors.color != scene.factors.other_color


def test_objects_are_whole_and_do_not_touch(scenes):
    for scene in itertools.chain(*scenes.values()):
        for thing in scene.objects:
            assert min(thing.x, thing.y) - thing.radius >= MARGIN - 1e-9
            assert max(thing.x, thing.y) + thing.radius <= 1 - MARGIN + 1e-9
        for a, b in itertools.combinations(scene.objects, 2):
            distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
            assert distance >= a.radius + b.radius + GAP - 1e-9


def test_stated_count_size_position_and_relation_are_those_drawn(scenes):
    for scene in itertools.chain(*scenes.values()):
        f, (*group, other) = scene.factors, scene.objects
        assert len(group) == f.number
        assert all((o.shape, o.color, o.texture) == (f.shape, f.color, f.texture) for o in group)
        assert (other.shape, other.color, other.texture) == (f.other_shape, f.other_color, "solid")
        assert all((o.radius > 0.13) == (f.size == "large") for o in group)
        left, right = min(o.x - o.radius for o in group), max(o.x + o.radius for o in group)
        top, bottom = min(o.y - o.radius for o in group), max(o.y + o.radius for o in group)
        relations = {
            "left of": other.x + other.radius < left,
            "right of": other.x - other.radius > right,
            "above": other.y + other.radius < top,
            "below": other.y - other.radius > bottom,
        }
        assert [name for name, holds in relations.items() if holds] == [f.relation]


def test_group_is_nearest_to_the_position_that_is_stated(scenes):
    anchors = {
        "left": (0.28, 0.5),
        "right": (0.72, 0.5),
        "top": (0.5, 0.28),
        "bottom": (0.5, 0.72),
        "center": (0.5, 0.5),
    }
    for scene in itertools.chain(*scenes.values()):
        group = scene.objects[:-1]
        x = (min(o.x for o in group) + max(o.x for o in group)) / 2
        y = (min(o.y for o in group) + max(o.y for o in group)) / 2
        nearest = min(anchors, key=lambda name: (x - anchors[name][0]) ** 2 + (y - anchors[name][1]) ** 2)
        assert nearest == scene.factors.position


def test_alternatives_change_one_factor_and_can_be_drawn(scenes):
    for scene in scenes["test"][:200]:
        for factor, values in FACTOR_VALUES.items():
            alternatives = scene.factors.alternatives(factor)
            assert 1 <= len(alternatives) <= len(values) - 1 <= 7
            for changed in alternatives:
                assert changed.is_possible()
                differing = [f for f in FACTOR_VALUES if changed.value(f) != scene.factors.value(f)]
                assert differing == [factor]


def test_a_scene_depends_on_seed_split_and_index_alone(scenes):
    assert sample_scene(3, "train", 7) == scenes["train"][7]
    assert sample_scene(4, "train", 7) != scenes["train"][7]
    assert len({s.style_seed for s in scenes["train"]}) == NUM


def test_unknown_names_are_refused_by_name(scenes):
    with pytest.raises(ValueError, match=r"unknown split 'val'; choose one of: train, test"):
        sample_scene(0, "val", 0)
    with pytest.raises(ValueError, match=r"unknown factor 'colour'; choose one of: shape, color"):
        scenes["test"][0].factors.alternatives("colour")
