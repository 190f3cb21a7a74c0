"""Captions drawn by weight, and what counts as a caption."""

from collections import Counter

import pytest

from vision_moe.data.caption_fields import captions_of, draw_caption
from vision_moe.data.read_config import ReadConfig, all_fields

RECAP = {"re_caption": "a long one", "caption": ["short", "brief"], "url": "http://example.org/a.jpg"}


def test_weights_decide_how_often_a_field_is_drawn():
    config = ReadConfig(caption_weights={"re_caption": 3, "caption": 1})
    drawn = Counter(draw_caption(RECAP, config, "x", (0, epoch, 7)) for epoch in range(4000))
    # 3/4, and a quarter shared by two captions; three standard deviations of 4000 draws are 0.02.
    assert drawn["a long one"] / 4000 == pytest.approx(0.75, abs=0.02)
    assert drawn["short"] / 4000 == pytest.approx(0.125, abs=0.02)
    assert drawn["brief"] / 4000 == pytest.approx(0.125, abs=0.02)


def test_a_draw_depends_on_its_key_alone():
    config = ReadConfig(caption_weights={"re_caption": 1, "caption": 1})
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(5) for index in range(5)]
    drawn = [draw_caption(RECAP, config, "x", key) for key in keys]
    assert [draw_caption(RECAP, config, "x", key) for key in keys] == drawn
    assert len(set(drawn)) == 3


def test_all_weighted_fields_are_captions_of_the_picture():
    config = ReadConfig(caption_weights={"re_caption": 0.8, "caption": 0.2})
    assert captions_of(RECAP, all_fields(config), "x") == ["a long one", "short", "brief"]
    with pytest.raises(ValueError, match="'re_caption'"):
        draw_caption({"caption": "short"}, config, "x", (0, 0, 0))


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1}, {"a+b": 1}, {"a": float("nan")}])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="caption_weights"):
        ReadConfig(caption_weights=weights)


def test_captions_are_found_in_each_usual_place():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    for metadata in ({"captions": ["A dog."]}, {"caption": "A dog."}, {"txt": "A dog."}, {"conversations": turns}):
        assert captions_of(metadata, "captions", "x") == ["A dog."]


def test_a_human_turn_is_no_caption():
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "What is it?"}]
    with pytest.raises(ValueError, match="x: 'captions'"):
        captions_of({"conversations": turns}, "captions", "x")
