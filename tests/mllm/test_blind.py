"""Pictures that tell nothing: which one another picture is replaced by."""

import pytest
from PIL import Image

from mllm.blind import blank, other_picture

COLORS = ("red", "green", "blue", "white", "black", "yellow")
# Two questions about each picture, one without, and one with a copy of the first.
DOCUMENTS = [
    *(Image.new("RGB", (4, 4), color) for color in COLORS for _ in range(2)),
    None,
    Image.new("L", (4, 4), 255),
]


def _pictures(document):
    return None if document is None else [document]


def _shown(seed, documents=DOCUMENTS):
    return [other_picture(image, documents, _pictures, seed=seed).getpixel((0, 0)) for image in DOCUMENTS if image]


def test_no_picture_gets_its_own_and_all_questions_about_one_get_the_same():
    own = [image.convert("RGB").getpixel((0, 0)) for image in DOCUMENTS if image]
    for seed in range(20):
        shown = _shown(seed)
        assert all(new != old for new, old in zip(shown, own, strict=True))
        assert shown[0:12:2] == shown[1:12:2]
        # The grey-scale picture is as white as the fourth.
        assert shown[6] == shown[-1]


def test_the_seed_decides():
    assert _shown(3) == _shown(3)
    assert len({tuple(_shown(seed)) for seed in range(5)}) == 5


def test_a_task_of_one_picture_cannot_be_shuffled():
    with pytest.raises(ValueError, match="none of 3 documents has another picture"):
        other_picture(DOCUMENTS[0], [DOCUMENTS[0], DOCUMENTS[1], None], _pictures, seed=0)


def test_a_blank_picture_keeps_the_size():
    image = blank(Image.new("RGB", (5, 3), "red"), (1, 2, 3))
    assert (image.size, image.getcolors()) == ((5, 3), [(15, (1, 2, 3))])
