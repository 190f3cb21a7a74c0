"""Yes/no questions whether a caption is a photo's own: the answer is in the photo and nowhere else."""

from collections import Counter

import pytest

from mllm.matching import matching_turns

# Photos 0 and 1 share a caption, as photos of one kind do.
CAPTIONS = [["a dog", "a brown dog"], ["a dog", "a wet dog"], ["a cat", "a grey cat"], ["a boat", "a red boat"]]


def asked(dialogue: list[dict[str, str]]) -> list[tuple[str, str]]:
    pairs = zip(dialogue[::2], dialogue[1::2], strict=True)
    return [(question["value"].split('"')[1], answer["value"]) for question, answer in pairs]


@pytest.mark.parametrize("seed", range(5))
def test_half_the_answers_are_yes_for_every_photo_and_for_every_caption(seed: int) -> None:
    dialogues = [asked(turns) for turns in matching_turns(CAPTIONS, 4, seed)]
    for own, pairs in zip(CAPTIONS, dialogues, strict=True):
        assert {caption for caption, answer in pairs if answer == "Yes"} == set(own)
        assert not {caption for caption, answer in pairs if answer == "No"} & set(own)
        assert Counter(answer for _, answer in pairs) == {"Yes": 2, "No": 2}
    everything = Counter(pair for pairs in dialogues for pair in pairs)
    for caption, answer in everything:
        assert everything[caption, answer] == everything[caption, "No" if answer == "Yes" else "Yes"]


def test_the_order_of_the_answers_differs_and_follows_the_seed() -> None:
    captions = [[f"photo {number}"] for number in range(30)]
    first, again, other = (matching_turns(captions, 2, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert {asked(turns)[0][1] for turns in first} == {"Yes", "No"}


@pytest.mark.parametrize(
    ("captions", "number", "message"),
    [
        (CAPTIONS, 3, "even number.*got 3"),
        (CAPTIONS, 0, "even number.*got 0"),
        (CAPTIONS[:1], 2, "no two of these 1 photos"),
        ([["a dog"], ["a dog"]], 2, "too alike"),
    ],
)
def test_what_cannot_be_balanced_is_refused(captions: list[list[str]], number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matching_turns(captions, number, 0)
