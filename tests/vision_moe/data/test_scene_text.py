"""Captions of Scenes: long ones name all factors, variants change one, words are few."""

import re
from collections import Counter

import pytest

from vision_moe.data.scene_factors import FACTOR_VALUES, Scene
from vision_moe.data.scene_layout import sample_scene
from vision_moe.data.scene_text import describe, long_caption, noun, place_phrase, relation_phrase, with_article

PHRASINGS = range(5)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(5, "test", i) for i in range(400)]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_long_caption_names_every_factor_in_at_most_45_words(scenes, phrasing):
    for scene in scenes:
        f, caption = scene.factors, long_caption(scene.factors, phrasing).lower()
        for phrase in (
            f.texture,
            f.size,
            f.count,
            f.color,
            noun(f.shape, f.number),
            place_phrase(f.position),
            relation_phrase(f.relation),
            f.background,
            with_article(f"{f.other_color} {f.other_shape}"),
        ):
            assert re.search(rf"\b{phrase}\b", caption), (phrase, caption)
        assert len(_words(caption)) <= 45


def test_different_factors_never_share_a_long_caption(scenes):
    texts = {long_caption(s.factors, p): s.factors for s in scenes for p in PHRASINGS}
    assert len(texts) == len({s.factors for s in scenes}) * len(PHRASINGS)


def test_variants_begin_with_the_true_caption_and_change_one_factor(scenes):
    for scene in scenes[:100]:
        text = describe(scene)
        assert set(text.variants) == set(FACTOR_VALUES)
        for factor, captions in text.variants.items():
            assert captions[0] == text.long
            assert len(captions) == len(set(captions)) == 1 + len(scene.factors.alternatives(factor))
            # The same phrasing with the changed value, and nothing else.
            phrasing = next(p for p in PHRASINGS if long_caption(scene.factors, p) == text.long)
            assert captions[1:] == [long_caption(f, phrasing) for f in scene.factors.alternatives(factor)]


def test_short_captions_name_mostly_color_and_shape_and_every_minor_factor_now_and_then(scenes):
    named: Counter[str] = Counter()
    for scene in scenes:
        f = scene.factors
        for caption in describe(scene).short:
            words = _words(caption)
            topics = {
                "color": f.color in words,
                "shape": noun(f.shape, f.number) in words,
                "texture": f.texture in words,
                "size": f.size in words,
                "count": f.count in words,
                "position": place_phrase(f.position) in caption,
                "relation": relation_phrase(f.relation) in caption,
                "background": f.background in words,
            }
            assert 1 <= sum(topics.values()) <= 2, caption
            named.update(name for name, there in topics.items() if there)
    total = 5 * len(scenes)
    assert named["color"] > 0.6 * total
    assert named["shape"] > 0.6 * total
    for minor in ("texture", "size", "count", "position", "relation", "background"):
        assert 0.02 * total < named[minor] < 0.06 * total


def test_captions_are_sentences_whose_articles_and_numbers_agree(scenes):
    for scene in scenes:
        f = scene.factors
        captions = [*describe(scene).short, *(long_caption(f, p) for p in PHRASINGS)]
        wrong = noun(f.shape, 1 if f.number > 1 else 2)
        for caption in captions:
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", caption), caption
            assert wrong not in _words(caption), caption
            assert (f.number == 1 or "there is" not in caption.lower()) or "something" in caption, caption
            assert caption[0].isupper()
            assert caption.endswith(".")


def test_captions_are_a_golden_function_of_seed_and_index():
    """Guards GENERATOR_VERSION: a change here must raise it."""
    text = describe(sample_scene(0, "test", 3))
    assert text.long == (
        "On a black background there is one large dotted pink circle in the center, "
        "and a purple cross to the left of it."
    )
    assert text.short[0] == "A picture of a pink circle."
