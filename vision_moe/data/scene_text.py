"""The captions of Scenes: short ones that name one factor or two, long ones that name all, one-factor variants.

The words are few (questions included, some 95) and the grammar is plain, so that a tiny tokenizer and a tiny
language model can learn both.
"""

from dataclasses import dataclass

import numpy as np

from vision_moe.data.scene_factors import FACTOR_VALUES, Factors, Scene

NUM_SHORT_CAPTIONS = 5
# Of the short captions, the share that names color and shape of the main group, and the shares that name one of them
# alone; the rest names one of the six minor factors. This skew is what a contrastive model turns into suppression.
COLOR_AND_SHAPE_SHARE = 0.62
COLOR_SHARE = 0.08
SHAPE_SHARE = 0.08
MINOR_FACTORS = ("texture", "size", "count", "position", "relation", "background")

_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
_RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}

_LONG = (
    "{count} {size} {texture} {color} {noun} {place}, with {other} {relation} {it}, on a {background} background.",
    "the picture shows {count} {size} {color} {noun} with a {texture} texture {place}, {other} {relation} {it}, "
    "and a {background} background.",
    "on a {background} background there {be} {count} {size} {texture} {color} {noun} {place}, "
    "and {other} {relation} {it}.",
    "{other} is {relation} {count} {size} {texture} {color} {noun} {place} of a picture "
    "with a {background} background.",
    "there {be} {count} {color} {noun} {place}. {it_subject} {be} {size} and {texture}, {other} is {relation} {it}, "
    "and the background is {background}.",
)
_SHORT = {
    "color and shape": (
        "{color_thing}.",
        "a picture of {color_thing}.",
        "there {be} {color_thing} here.",
        "an image with {color_thing}.",
        "we see {color_thing}.",
        "the {noun} {be} {color}.",
    ),
    "shape": ("{thing}.", "a picture of {thing}.", "there {be} {thing} here.", "an image with {thing}."),
    "color": ("something {color}.", "a picture of something {color}.", "there is something {color} here."),
    "texture": (
        "{texture_thing}.",
        "the {noun} {be} {texture}.",
        "something {color} and {texture}.",
        "something {texture}.",
    ),
    "size": (
        "{size_thing}.",
        "the {noun} {be} {size}.",
        "something {color} and {size}.",
        "something {size}.",
    ),
    "count": (
        "{count} {noun}.",
        "there {be} {count} {noun}.",
        "a picture of {count} {noun}.",
        "we see {count} {noun}.",
    ),
    "position": (
        "{thing} {place}.",
        "the {noun} {be} {place}.",
        "something {color} {place}.",
        "a picture with {thing} {place}.",
    ),
    "relation": (
        "another shape {relation} the {noun}.",
        "something {relation} the {noun}.",
        "another shape is {relation} {color_it}.",
    ),
    "background": (
        "a {background} background.",
        "the background is {background}.",
        "{thing} on a {background} background.",
        "something {color} on a {background} background.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SceneText:
    """All that captions say of one scene."""

    short: list[str]
    """Captions that name one factor or two."""
    long: str
    """One caption that names all factors."""
    variants: dict[str, list[str]]
    """By factor: the long caption, then the same with this factor changed to each other possible value."""


def describe(scene: Scene) -> SceneText:
    """Return the captions of a scene; their phrasing is drawn from the scene's own seed."""
    rng = np.random.default_rng([scene.style_seed, 1])
    template = int(rng.integers(len(_LONG)))
    factors = scene.factors
    long = long_caption(factors, template)
    variants = {
        name: [long, *(long_caption(changed, template) for changed in factors.alternatives(name))]
        for name in FACTOR_VALUES
    }
    return SceneText(short=_short_captions(factors, rng), long=long, variants=variants)


def long_caption(factors: Factors, template: int) -> str:
    """Return the caption that names all factors, in one of the phrasings 0 to 4."""
    return _sentences(_LONG[template].format_map(_words(factors)))


def noun(shape: str, number: int) -> str:
    """Return the noun of a shape for that many objects."""
    if number == 1:
        return shape
    return shape + ("es" if shape == "cross" else "s")


def with_article(words: str) -> str:
    """Prefix a singular noun phrase with its indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_phrase(position: str) -> str:
    """Return a position as it is said: `on the left`."""
    return _PLACES[position]


def relation_phrase(relation: str) -> str:
    """Return a relation as it is said: `to the left of`."""
    return _RELATIONS[relation]


def _words(factors: Factors) -> dict[str, str]:
    """Return what the fields of the templates stand for."""
    one = factors.number == 1
    things = noun(factors.shape, factors.number)

    def phrase(*adjectives: str) -> str:
        words = " ".join((*adjectives, things))
        return with_article(words) if one else words

    return {
        **factors.as_dict(),
        "noun": things,
        "place": _PLACES[factors.position],
        "relation": _RELATIONS[factors.relation],
        "other": with_article(f"{factors.other_color} {factors.other_shape}"),
        "be": "is" if one else "are",
        "it": "it" if one else "them",
        "it_subject": "it" if one else "they",
        "thing": phrase(),
        "color_thing": phrase(factors.color),
        "texture_thing": phrase(factors.texture),
        "size_thing": phrase(factors.size),
        "color_it": f"something {factors.color}",
    }


def _short_captions(factors: Factors, rng: np.random.Generator) -> list[str]:
    """Draw the short captions: dominant factors in most, every other factor now and then."""
    words = _words(factors)
    captions = []
    for _ in range(NUM_SHORT_CAPTIONS):
        templates = _SHORT[_draw_topic(rng)]
        captions.append(_sentences(templates[int(rng.integers(len(templates)))].format_map(words)))
    return captions


def _draw_topic(rng: np.random.Generator) -> str:
    share = float(rng.uniform())
    if share < COLOR_AND_SHAPE_SHARE:
        return "color and shape"
    if share < COLOR_AND_SHAPE_SHARE + COLOR_SHARE:
        return "color"
    if share < COLOR_AND_SHAPE_SHARE + COLOR_SHARE + SHAPE_SHARE:
        return "shape"
    return MINOR_FACTORS[int(rng.integers(len(MINOR_FACTORS)))]


def _sentences(text: str) -> str:
    """Capitalize the first letter of each sentence."""
    return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
