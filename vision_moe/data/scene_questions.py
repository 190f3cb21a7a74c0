"""Yes/no questions about Scenes, each question text as often true as false.

A question about what is in one picture is asked again, word for word, about another picture where the answer is
no. So P(yes | text) = 1/2 for every text, and whoever does not look at the picture is right half of the time.
POPE's three ways to choose the absent object (Li et al. 2023, section 4) become: `random`, any absent kind;
`popular`, an absent shape whatever its color (shapes are the most frequent objects); `adversarial`, an absent
kind that shares color or shape with what is there, above all the color of one object on the shape of the other.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vision_moe.data.scene_factors import Factors
from vision_moe.data.scene_text import noun, place_phrase, relation_phrase, with_article

CATEGORIES = ("random", "popular", "adversarial")
# What a question is about: (color, shape), or ("", shape) for a shape whatever its color.
Kind = tuple[str, str]
Topic = TypeVar("Topic")
_MAX_SWAPS = 400


@dataclass(frozen=True, kw_only=True)
class YesNo:
    """One question about picture `index`; answer is `yes` or `no`."""

    index: int
    text: str
    answer: str
    category: str


def existence_text(kind: Kind) -> str:
    """Ask for a kind of object in POPE's words."""
    return f"Is there {with_article(' '.join(filter(None, kind)))} in the image?"


def is_present(kind: Kind, factors: Factors) -> bool:
    """Whether an object of this kind is in the picture."""
    color, shape = kind
    there = ((factors.color, factors.shape), (factors.other_color, factors.other_shape))
    return any(shape == s and color in ("", c) for c, s in there)


def existence_questions(
    scenes: Sequence[Factors],
    slots: tuple[Sequence[int], Sequence[int]],
    category: str,
    asked: Set[tuple[int, str]],
    rng: np.random.Generator,
) -> list[YesNo]:
    """Ask, in one category, about an object that is there and about one that is not.

    Args:
        scenes: the factors of all pictures.
        slots: indices of the pictures to ask a question with answer yes, and as many with answer no.
        category: one of `CATEGORIES`.
        asked: (index, text) of earlier questions, not to be asked again.
        rng: decides which objects are asked for, and where.

    Returns:
        questions in which every text has as many yes as no; fewer than slots where all that is there was asked for
        earlier, or no fitting picture was found.

    Raises:
        ValueError: if the category is unknown.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; choose one of: {', '.join(CATEGORIES)}")
    positives, kinds = [], []
    for index in slots[0]:
        f = scenes[index]
        there = [(f.color, f.shape), (f.other_color, f.other_shape)]
        there = [("", shape) if category == "popular" else (color, shape) for color, shape in there]
        fresh = [kind for kind in there if (index, existence_text(kind)) not in asked]
        if fresh:
            positives.append(index)
            kinds.append(fresh[int(rng.integers(len(fresh)))])
    negatives = slots[1][: len(positives)]

    def fits(index: int, kind: Kind) -> bool:
        f = scenes[index]
        if is_present(kind, f) or (index, existence_text(kind)) in asked:
            return False
        return category != "adversarial" or kind[0] in (f.color, f.other_color) or kind[1] in (f.shape, f.other_shape)

    chosen = _swapped_kinds(scenes, negatives, kinds) if category == "adversarial" else {}
    return [
        YesNo(index=index, text=existence_text(kind), answer=answer, category=category)
        for yes, no, kind in _balance(positives, negatives, kinds, fits, chosen, rng)
        for index, answer in ((yes, "yes"), (no, "no"))
    ]


def factor_questions(
    scenes: Sequence[Factors],
    slots: tuple[Sequence[int], Sequence[int]],
    asked: Set[tuple[int, str]],
    rng: np.random.Generator,
) -> list[YesNo]:
    """Ask about one factor of the main group or the background ("Are the stars striped?"), as balanced as above.

    A negative picture has what the question takes for granted (stars, of that number) and another value of the factor.
    """
    groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, indices in enumerate(slots):
        for index in indices:
            factor = _ASKED_FACTORS[int(rng.integers(len(_ASKED_FACTORS)))]
            groups[(factor, *_premise(factor, scenes[index]))][side].append(index)
    questions = []
    for key in sorted(groups):
        factor, (yes_indices, no_indices) = key[0], groups[key]
        yes_indices = [i for i in yes_indices if (i, _factor_text(factor, scenes[i])) not in asked]
        size = min(len(yes_indices), len(no_indices))
        texts = [_factor_text(factor, scenes[index]) for index in yes_indices[:size]]

        def fits(index: int, text: str, factor: str = factor) -> bool:
            return _factor_text(factor, scenes[index]) != text and (index, text) not in asked

        for yes, no, text in _balance(yes_indices[:size], no_indices[:size], texts, fits, {}, rng):
            questions.append(YesNo(index=yes, text=text, answer="yes", category=factor))
            questions.append(YesNo(index=no, text=text, answer="no", category=factor))
    return questions


_ASKED_FACTORS = ("color", "texture", "size", "count", "position", "relation", "background")


def _premise(factor: str, f: Factors) -> tuple[str, ...]:
    """Return what a question about the factor presupposes of the picture."""
    if factor == "background":
        return ()
    if factor == "count":
        return (f.shape,)
    number = "one" if f.number == 1 else "several"
    return (f.shape, number, f.other_shape) if factor == "relation" else (f.shape, number)


def _factor_text(factor: str, f: Factors) -> str:
    """Return the question about a factor whose true answer for this picture is yes."""
    things = noun(f.shape, f.number)
    be = "Is" if f.number == 1 else "Are"
    if factor == "background":
        return f"Is the background {f.background}?"
    if factor == "count":
        return f"{be} there {f.count} {things} in the image?"
    if factor == "relation":
        return f"Is the {f.other_shape} {relation_phrase(f.relation)} the {things}?"
    if factor == "position":
        return f"{be} the {things} {place_phrase(f.position)}?"
    return f"{be} the {things} {f.value(factor)}?"


def _swapped_kinds(scenes: Sequence[Factors], negatives: Sequence[int], kinds: Sequence[Kind]) -> dict[int, int]:
    """Choose topics for as many negatives as possible: the color of one object on the shape of the other.

    Returns:
        by position in `negatives`, the position in `kinds` of its topic.
    """
    left: dict[Kind, list[int]] = defaultdict(list)
    for position, kind in enumerate(kinds):
        left[kind].append(position)
    chosen: dict[int, int] = {}
    for slot, index in enumerate(negatives):
        f = scenes[index]
        for kind in ((f.color, f.other_shape), (f.other_color, f.shape)):
            if left[kind]:
                chosen[slot] = left[kind].pop()
                break
    return chosen


def _balance(
    positives: Sequence[int],
    negatives: Sequence[int],
    topics: Sequence[Topic],
    fits: Callable[[int, Topic], bool],
    chosen: Mapping[int, int],
    rng: np.random.Generator,
) -> list[tuple[int, int, Topic]]:
    """Hand every topic, true of its positive picture, to one negative picture that it fits (is false of).

    Slots in `chosen` start with their topic and the others with a random one; a slot whose topic does not fit swaps
    with random others until both fit. What stays unfit is dropped on both sides.

    Returns:
        triples (positive picture, negative picture, topic).
    """
    if len(positives) != len(negatives):
        raise ValueError(f"need as many negatives as positives, but got {len(negatives)} and {len(positives)}")
    count = len(topics)
    taken = set(chosen.values())
    rest = iter(rng.permutation([t for t in range(count) if t not in taken]).tolist())
    topic_of = [chosen[slot] if slot in chosen else next(rest) for slot in range(count)]
    for slot in range(count):
        if fits(negatives[slot], topics[topic_of[slot]]):
            continue
        for partner in rng.integers(count, size=_MAX_SWAPS).tolist():
            mine, theirs = topic_of[slot], topic_of[partner]
            if fits(negatives[slot], topics[theirs]) and fits(negatives[partner], topics[mine]):
                topic_of[slot], topic_of[partner] = theirs, mine
                break
    return [
        (positives[topic], negatives[slot], topics[topic])
        for slot, topic in enumerate(topic_of)
        if fits(negatives[slot], topics[topic])
    ]
