"""Questions on Scenes: answers are true, and the text alone gives nothing away."""

import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from vision_moe.data.scene_dialogues import Captioned, finetune_records, pope_lines, pretrain_records
from vision_moe.data.scene_factors import COUNTS, Factors
from vision_moe.data.scene_layout import sample_scene
from vision_moe.data.scene_questions import existence_questions, is_present
from vision_moe.data.scene_text import describe, noun, place_phrase, relation_phrase


def _pictures(split: str, num: int) -> list[Captioned]:
    pictures = []
    for index in range(num):
        scene, key = sample_scene(2, split, index), f"{split}{index:06d}"
        text = describe(scene)
        pictures.append(
            Captioned(
                key=key, image=f"{split}/{key}.jpg", factors=scene.factors, short=text.short, long=text.long, cells=""
            )
        )
    return pictures


@pytest.fixture(scope="module")
def train() -> list[Captioned]:
    return _pictures("train", 2000)


@pytest.fixture(scope="module")
def held_out() -> list[Captioned]:
    return _pictures("test", 600)


@pytest.fixture(scope="module")
def finetune(train) -> list[dict]:
    return finetune_records(train, seed=0)


@pytest.fixture(scope="module")
def pope(held_out) -> list[dict]:
    return pope_lines(held_out, seed=0)


def _turns(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in record["conversations"]]
    return [(q.replace("<image>", "").strip(), a) for q, a in zip(values[::2], values[1::2], strict=True)]


def _truth(question: str, f: Factors) -> bool:
    """Answer a yes/no question by reading it, independently of the code that wrote it."""
    there = {(f.color, f.shape), (f.other_color, f.other_shape)}
    if found := re.fullmatch(r"Is there an? (?:(\w+) )?(\w+) in the image\?", question):
        return any(found[1] in (None, color) and found[2] == shape for color, shape in there)
    if found := re.fullmatch(r"Is the background (\w+)\?", question):
        return found[1] == f.background
    if found := re.fullmatch(r"(?:Is|Are) there (one|two|three|four) (\w+) in the image\?", question):
        return found[1] == f.count and found[2] == noun(f.shape, COUNTS.index(found[1]) + 1)
    things = noun(f.shape, f.number)
    if found := re.fullmatch(rf"Is the {f.other_shape} (.+) the {things}\?", question):
        return found[1] == relation_phrase(f.relation)
    found = re.fullmatch(rf"(?:Is|Are) the {things} (.+)\?", question)
    assert found, f"{question!r} presupposes what is not in the picture: {f}"
    return found[1] in (f.color, f.texture, f.size, place_phrase(f.position))


def test_yes_no_answers_are_true_of_the_picture(train, held_out, finetune, pope):
    asked = 0
    for picture, record in zip(train, finetune, strict=True):
        for question, answer in _turns(record):
            if answer in ("Yes", "No"):
                assert _truth(question, picture.factors) == (answer == "Yes"), (question, picture.factors)
                asked += 1
    assert asked > 2.5 * len(train)
    by_image = {picture.image: picture.factors for picture in held_out}
    for line in pope:
        assert _truth(line["text"], by_image[line["image"]]) == (line["label"] == "yes")


def test_every_question_text_is_as_often_true_as_false(finetune, pope):
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in finetune:
        for question, answer in _turns(record):
            if answer in ("Yes", "No"):
                counts[question][answer] += 1
    assert len(counts) > 150
    assert all(c["Yes"] == c["No"] for c in counts.values())
    by_category: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for line in pope:
        by_category[line["category"], line["text"]][line["label"]] += 1
    assert all(c["yes"] == c["no"] for c in by_category.values())


def test_an_answerer_by_text_alone_fit_on_train_is_at_chance_on_pope(finetune, pope):
    yes: Counter[str] = Counter()
    for record in finetune:
        for question, answer in _turns(record):
            yes[question] += {"Yes": 1, "No": -1}.get(answer, 0)
    right = sum((yes[line["text"]] >= 0) == (line["label"] == "yes") for line in pope)
    assert 0.48 <= right / len(pope) <= 0.52


def test_earlier_answers_of_a_dialogue_do_not_tell_the_next_one(finetune):
    """Were every dialogue balanced by itself, its last answer would follow from the others."""
    same = total = 0
    for record in finetune:
        answers = [a for _, a in _turns(record) if a in ("Yes", "No")]
        same += sum(a == b for a, b in pairwise(answers))
        total += max(0, len(answers) - 1)
    assert abs(same / total - 0.5) < 5 * (0.25 / total) ** 0.5


def test_pope_asks_one_present_and_one_absent_object_per_picture_and_category(held_out, pope):
    counts = Counter((line["image"], line["category"], line["label"]) for line in pope)
    assert len(pope) == 500 * 3 * 2
    assert set(counts.values()) <= {1, 2}
    per_label = Counter((line["category"], line["label"]) for line in pope)
    assert set(per_label.values()) == {500}
    assert [line["question_id"] for line in pope] == list(range(1, 3001))
    assert len({(line["image"], line["text"]) for line in pope}) == len(pope)


def test_adversarial_objects_share_color_or_shape_with_what_is_there_and_most_are_mixtures(held_out, pope):
    by_image = {picture.image: picture.factors for picture in held_out}
    absent = [line for line in pope if line["category"] == "adversarial" and line["label"] == "no"]
    mixtures = 0
    for line in absent:
        f = by_image[line["image"]]
        color, shape = re.fullmatch(r"Is there an? (\w+) (\w+) in the image\?", line["text"]).groups()
        assert color in (f.color, f.other_color) or shape in (f.shape, f.other_shape)
        mixtures += (color, shape) in {(f.color, f.other_shape), (f.other_color, f.shape)}
    assert mixtures > 0.6 * len(absent)


def test_open_answers_are_short_and_descriptions_end_a_dialogue(train, finetune):
    described = 0
    for picture, record in zip(train, finetune, strict=True):
        turns = _turns(record)
        assert len({question for question, _ in turns}) == len(turns)
        for number, (_, answer) in enumerate(turns):
            if len(answer.split()) > 3:
                assert number == len(turns) - 1
                assert answer == picture.long
                described += 1
    assert 0.5 * len(train) < described < 0.65 * len(train)


def test_records_have_llavas_form(train, finetune):
    for records in (finetune, pretrain_records(train, seed=0)):
        assert len(records) == len(train)
        for picture, record in zip(train, records, strict=True):
            assert (record["id"], record["image"]) == (picture.key, picture.image)
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [t["value"].count("<image>") for t in turns] == [1] + [0] * (len(turns) - 1)


def test_the_vocabulary_is_closed_and_small(train, finetune, pope):
    words: set[str] = set()
    for picture in train:
        for caption in (*picture.short, picture.long):
            words.update(re.findall(r"[a-z]+", caption.lower()))
    for record in finetune + pretrain_records(train, seed=0):
        for turn in record["conversations"]:
            words.update(re.findall(r"[a-z]+", turn["value"].lower()))
    asked = {word for line in pope for word in re.findall(r"[a-z]+", line["text"].lower())}
    assert asked <= words
    assert len(words) <= 150


def test_a_set_too_small_to_balance_drops_questions_on_both_sides(train):
    scenes = [train[0].factors, train[0].factors]
    questions = existence_questions(scenes, ([0], [1]), "random", set(), np.random.default_rng(0))
    assert questions == []
    assert is_present((train[0].factors.color, train[0].factors.shape), train[0].factors)


def test_an_unknown_category_is_refused(train):
    with pytest.raises(ValueError, match=r"unknown category 'hard'; choose one of: random, popular, adversarial"):
        existence_questions([], ([], []), "hard", set(), None)
