"""What is asked about Scenes as files: LLaVA conversations for both stages, and POPE's question list."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vision_moe.data.scene_factors import SHAPES, Factors
from vision_moe.data.scene_questions import CATEGORIES, YesNo, existence_questions, factor_questions
from vision_moe.data.scene_text import noun, place_phrase, relation_phrase

Turn = tuple[str, str]
Record = dict[str, object]
# POPE asks about 500 pictures, one present and one absent object each in every category (POPE has three of each).
MAX_POPE_PICTURES = 500
NUM_OPEN_QUESTIONS = 3
NUM_COUNTING_QUESTIONS = 3
# Half of the counting questions are about kinds that are not there, so that whoever looks for what to count must also
# notice when there is nothing to find.
ABSENT_SHARE = 0.5
# Rounds of one question of each POPE category and one about another factor: a picture costs far more than a question.
QUESTION_ROUNDS = 3
# This share of the pictures is only described; after a dialogue the description ends every second conversation.
DESCRIBED_ONLY_SHARE = 0.15
PRETRAIN_LONG_SHARE = 0.8

_DETAILED = (
    "Describe the image in detail.",
    "Give a detailed description of the image.",
    "What can you see in the image?",
    "Please describe all that is in the picture.",
)
_BRIEF = ("Describe the image briefly.", "Give a short description of the picture.", "What is this?")


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A picture without its pixels: key and path below the image folder, truth, captions, cells in words."""

    key: str
    image: str
    factors: Factors
    short: list[str]
    long: str
    cells: str


def pretrain_records(pictures: Sequence[Captioned], seed: int) -> list[Record]:
    """Return LLaVA's stage-1 list: one description a picture, mostly the long caption."""
    rng = np.random.default_rng([seed, 2])
    records = []
    for picture in pictures:
        if rng.uniform() < PRETRAIN_LONG_SHARE:
            turn = (_choice(_DETAILED, rng), picture.long)
        else:
            turn = (_choice(_BRIEF, rng), _choice(picture.short, rng))
        records.append(_record(picture, [turn], rng))
    return records


def finetune_records(pictures: Sequence[Captioned], seed: int) -> list[Record]:
    """Return LLaVA's stage-2 list: per picture up to twelve yes/no questions, three open ones and three that
    count, and a description.

    Yes and no are independent between the questions of a picture, and every yes/no text is as often true as false.
    """
    rng = np.random.default_rng([seed, 3])
    scenes = [picture.factors for picture in pictures]
    described_only = rng.uniform(size=len(pictures)) < DESCRIBED_ONLY_SHARE
    asked_about = np.flatnonzero(~described_only).tolist()
    closed: dict[int, list[Turn]] = defaultdict(list)
    for question in _training_questions(scenes, asked_about, rng):
        closed[question.index].append((question.text, question.answer.capitalize()))
    records = []
    for index, picture in enumerate(pictures):
        description = (_choice(_DETAILED, rng), picture.long)
        if described_only[index]:
            records.append(_record(picture, [description], rng))
            continue
        turns = [_shuffled(closed[index], rng), _asking_for_words(picture.factors, rng)]
        # An answer heard earlier needs no look at the picture: half of the dialogues begin with the yes/no questions,
        # half with the open ones, and the description, which says all, is always last.
        first = int(rng.integers(2))
        dialogue = [*turns[first], *turns[1 - first], *([description] if rng.uniform() < 0.5 else [])]
        records.append(_record(picture, dialogue, rng))
    return records


def pope_lines(pictures: Sequence[Captioned], seed: int) -> list[Record]:
    """Return POPE's question list over the first 500 pictures: per picture and category one yes and one no."""
    rng = np.random.default_rng([seed, 4])
    scenes = [picture.factors for picture in pictures[:MAX_POPE_PICTURES]]
    everyone = list(range(len(scenes)))
    asked: set[tuple[int, str]] = set()
    lines: list[Record] = []
    for category in CATEGORIES:
        questions = existence_questions(scenes, (everyone, everyone), category, asked, rng)
        asked.update((q.index, q.text) for q in questions)
        for question in sorted(questions, key=lambda q: (q.index, q.answer == "no")):
            line = {
                "question_id": len(lines) + 1,
                "image": pictures[question.index].image,
                "text": question.text,
            }
            lines.append({**line, "label": question.answer, "category": question.category})
    return lines


def _training_questions(scenes: Sequence[Factors], indices: Sequence[int], rng: np.random.Generator) -> list[YesNo]:
    """Ask, in each round, one question of each POPE category and one about another factor, of every picture."""
    asked: set[tuple[int, str]] = set()
    questions: list[YesNo] = []
    for _ in range(QUESTION_ROUNDS):
        for category in CATEGORIES:
            found = existence_questions(scenes, _halves(indices, rng), category, asked, rng)
            asked.update((q.index, q.text) for q in found)
            questions.extend(found)
        found = factor_questions(scenes, _halves(indices, rng), asked, rng)
        asked.update((q.index, q.text) for q in found)
        questions.extend(found)
    return questions


def _halves(indices: Sequence[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split the pictures at random into those to be answered yes and, as many, no."""
    order = rng.permutation(np.asarray(indices, dtype=np.int64)).tolist()
    half = len(order) // 2
    return order[:half], order[half : 2 * half]


def _asking_for_words(f: Factors, rng: np.random.Generator) -> list[Turn]:
    counting = [_counting_question(f, rng) for _ in range(NUM_COUNTING_QUESTIONS)]
    return _shuffled([*_open_questions(f, rng), *dict(counting).items()], rng)


def _counting_question(f: Factors, rng: np.random.Generator) -> Turn:
    """Ask how many of a kind there are; kinds that are not there mix the two that are, or have a third shape."""
    if rng.uniform() < ABSENT_SHARE:
        others = [shape for shape in SHAPES if shape not in (f.shape, f.other_shape)]
        third = _choice(others, rng)
        kinds = [(f.color, f.other_shape), (f.other_color, f.shape), ("", third), (f.color, third)]
        count = "zero"
    else:
        kinds, count = [(f.color, f.shape), ("", f.shape)], f.count
        if rng.uniform() < 0.5:
            kinds, count = [(f.other_color, f.other_shape), ("", f.other_shape)], "one"
    color, shape = kinds[int(rng.integers(len(kinds)))]
    return " ".join(filter(None, ("How many", color, noun(shape, 2), "are there?"))), count.capitalize()


def _open_questions(f: Factors, rng: np.random.Generator) -> list[Turn]:
    """Draw open questions; the two kinds differ in shape and color, so either word names one of them for certain."""
    things = noun(f.shape, f.number)
    be, one = ("is", True) if f.number == 1 else ("are", False)
    turns = [
        (f"What color {be} the {things}?", f.color),
        (f"What color is the {f.other_shape}?", f.other_color),
        (f"What shape {be} the {f.color} object{'' if one else 's'}?", f.shape),
        (f"What shape is the {f.other_color} object?", f.other_shape),
        (f"What is the texture of the {things}?", f.texture),
        (f"{be.capitalize()} the {things} small or large?", f.size),
        (f"Where {be} the {things}?", place_phrase(f.position)),
        (
            f"Where is the {f.other_shape}, seen from the {things}?",
            relation_phrase(f.relation).removesuffix(" of"),
        ),
        ("What is the background?", f.background),
    ]
    drawn = rng.choice(len(turns), size=NUM_OPEN_QUESTIONS, replace=False)
    return [(turns[i][0], turns[i][1].capitalize()) for i in drawn.tolist()]


def _record(picture: Captioned, turns: Sequence[Turn], rng: np.random.Generator) -> Record:
    """Return a LLaVA record; the image stands before or after the first question, as in LLaVA's own data."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        if number == 0:
            question = f"<image>\n{question}" if rng.uniform() < 0.5 else f"{question}\n<image>"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": picture.key, "image": picture.image, "conversations": conversations}


def _shuffled(turns: Sequence[Turn], rng: np.random.Generator) -> list[Turn]:
    return [turns[i] for i in rng.permutation(len(turns)).tolist()]


def _choice(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
