"""Recall at k against examples worked by hand, and end to end on a model whose answers are known."""

import numpy as np
import pytest

from vision_moe.retrieval import Embeddings, hits_by_picture, ranks, retrieval_metrics


def _unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def worked():
    """Three pictures with 2, 1 and 1 captions in the plane, by angle.

    pictures: 0, 90, 180 degrees; captions: 10 (picture 0), 80 (picture 0), 70 (picture 1), 100 (picture 2).
    picture 0: nearest caption is 10, its own -> rank 0
    picture 1: nearest are 80 (picture 0's) and 100 (picture 2's), 10 degrees off; its own 70 is 20 off -> rank 2
    picture 2: nearest is 100, its own -> rank 0
    caption 10 -> picture 0 first: 0; caption 80 -> picture 1 stands before picture 0: 1; caption 70 -> 0;
    caption 100 -> picture 1 (10 off) before picture 2 (80 off), picture 0 is 100 off: 1
    """
    degrees = np.deg2rad([0, 90, 180])
    captions = np.deg2rad([10, 80, 70, 100])
    return Embeddings(
        _unit(np.stack([np.cos(degrees), np.sin(degrees)], axis=1)),
        _unit(np.stack([np.cos(captions), np.sin(captions)], axis=1)),
        np.array([0, 0, 1, 2]),
    )


def test_ranks_are_those_worked_by_hand(worked):
    found = ranks(worked)
    assert found.image_to_text.tolist() == [0, 2, 0]
    assert found.text_to_image.tolist() == [0, 1, 0, 1]


def test_recall_follows_from_the_ranks(worked):
    result = retrieval_metrics(worked, ks=(1, 2, 3))
    assert result["image_to_text"] == pytest.approx({"R@1": 2 / 3, "R@2": 2 / 3, "R@3": 1.0})
    assert result["text_to_image"] == pytest.approx({"R@1": 0.5, "R@2": 1.0, "R@3": 1.0})
    assert result["mean_R@1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (result["num_images"], result["num_captions"]) == (3, 4)
    low, high = result["mean_R@1_interval"]
    assert low <= result["mean_R@1"] <= high
    for way in ("image_to_text", "text_to_image"):
        for name, (low, high) in result[f"{way}_interval"].items():
            assert low <= result[way][name] <= high


def test_a_pictures_captions_are_its_questions(worked):
    hits, questions = hits_by_picture(ranks(worked), worked.image_of_text, 1)
    # Picture 0's two captions: one hit; picture 1's: hit; picture 2's: miss.
    assert hits.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert questions.tolist() == [[1, 1, 1], [2, 1, 1]]


def test_chunks_do_not_change_the_ranks():
    rng = np.random.default_rng(0)
    embeddings = Embeddings(_unit(rng.normal(size=(23, 8))), _unit(rng.normal(size=(60, 8))), np.arange(60) % 23)
    whole, parts = ranks(embeddings, chunk=1000), ranks(embeddings, chunk=7)
    assert np.array_equal(whole.image_to_text, parts.image_to_text)
    assert np.array_equal(whole.text_to_image, parts.text_to_image)


def test_ranks_match_sorting_one_by_one():
    rng = np.random.default_rng(1)
    embeddings = Embeddings(_unit(rng.normal(size=(9, 5))), _unit(rng.normal(size=(20, 5))), np.arange(20) % 9)
    found = ranks(embeddings)
    for i, image in enumerate(embeddings.image):
        order = np.argsort(-(embeddings.text @ image))
        assert next(r for r, m in enumerate(order) if embeddings.image_of_text[m] == i) == found.image_to_text[i]
    for m, text in enumerate(embeddings.text):
        order = np.argsort(-(embeddings.image @ text))
        assert order.tolist().index(embeddings.image_of_text[m]) == found.text_to_image[m]


def test_a_collapsed_model_scores_zero():
    same = np.tile(_unit([[1.0, 2.0, 3.0]]), (12, 1))
    result = retrieval_metrics(Embeddings(same, same, np.arange(12)))
    assert result["image_to_text"]["R@10"] == 0.0
    assert result["text_to_image"]["R@10"] == 0.0


def test_a_caption_without_score_is_an_error():
    image = _unit([[1.0, 0.0], [0.0, 1.0]])
    text = image.copy()
    text[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        ranks(Embeddings(image, text, np.array([0, 1])))


def test_a_picture_without_caption_is_an_error():
    image = _unit([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="needs a caption"):
        ranks(Embeddings(image, image, np.array([0, 0])))
