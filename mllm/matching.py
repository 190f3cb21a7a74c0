"""Yes/no questions whether a caption is a photo's own, balanced so that only the photo can answer them.

Half of the answers are yes, for every photo and for every caption: a caption that is asked about beside its own photo
is asked about once beside another one. Who knows nothing but the captions gets half of them right.
"""

import random
from collections.abc import Sequence

_QUESTION = 'Is this a caption of the photo: "{caption}" Answer yes or no.'

Turns = list[dict[str, str]]


def matching_turns(captions: Sequence[Sequence[str]], num_questions: int, seed: int) -> list[Turns]:
    """Questions about each photo with their answers, in random order.

    Args:
        captions: of each photo; the first ones are asked about.
        num_questions: for each photo, an even number.
        seed: decides which photos are confused, and the order.

    Raises:
        ValueError: an odd number, fewer than two photos, or captions so alike that no two photos can be confused.
    """
    if num_questions < 2 or num_questions % 2:
        raise ValueError(f"the questions must be an even number, half yes and half no, but got {num_questions}")
    rng = random.Random(seed)
    dialogues: list[list[tuple[str, str]]] = [[] for _ in captions]
    for number in range(num_questions // 2):
        asked = [own[number % len(own)] for own in captions]
        for dialogue, right, wrong in zip(dialogues, asked, _strangers(captions, asked, rng), strict=True):
            dialogue += [(right, "Yes"), (wrong, "No")]
    for dialogue in dialogues:
        rng.shuffle(dialogue)
    return [[turn for pair in dialogue for turn in _turns(*pair)] for dialogue in dialogues]


def _strangers(captions: Sequence[Sequence[str]], asked: Sequence[str], rng: random.Random) -> list[str]:
    """For each photo what is asked about another one, each once, and never what is its own caption too."""
    order = rng.sample(range(len(captions)), len(captions))
    for shift in range(1, len(order)):
        other = dict(zip(order, order[shift:] + order[:shift], strict=True))
        if all(asked[other[number]] not in own for number, own in enumerate(captions)):
            return [asked[other[number]] for number in range(len(captions))]
    raise ValueError(f"no two of these {len(captions)} photos can be confused: their captions are too few or too alike")


def _turns(caption: str, answer: str) -> Turns:
    return [{"from": "human", "value": _QUESTION.format(caption=caption)}, {"from": "gpt", "value": answer}]
