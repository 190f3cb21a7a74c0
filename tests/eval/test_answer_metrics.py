"""Scores of yes/no answers and of class scores, against examples worked by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from eval.imagenet_o import doubt
from eval.metrics import aupr, label_ranks, mcnemar, mean_per_class, share, yes_no_scores


def test_yes_no_scores_are_those_worked_by_hand():
    # true yes 2, false yes 1, false no 1, true no 1, unparsed 1 (its truth is yes)
    answers = ["yes", " Yes", "yes", "no", "NO", "Yes, there is"]
    truths = ["yes", "yes", "no", "yes", "no", "yes"]
    scores = yes_no_scores(answers, truths)
    assert scores["accuracy"]["value"] == pytest.approx(3 / 6)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 4)
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["yes_ratio"] == pytest.approx(3 / 6)
    assert scores["true_yes_ratio"] == pytest.approx(4 / 6)
    assert scores["unparsed"] == pytest.approx(1 / 6)


def test_a_model_that_never_says_yes_has_no_f1_and_a_yes_ratio_of_zero():
    scores = yes_no_scores(["no", "no"], ["yes", "no"])
    assert (scores["f1"], scores["yes_ratio"], scores["true_yes_ratio"]) == (0.0, 0.0, 0.5)


@pytest.mark.parametrize(("answers", "truths"), [([], []), (["yes"], []), (["yes"], ["maybe"])])
def test_yes_no_scores_refuse_what_they_cannot_count(answers, truths):
    with pytest.raises(ValueError, match="truths"):
        yes_no_scores(answers, truths)


def test_label_ranks_count_ties_against_the_label():
    scores = np.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3], [0.5, 0.5 - 1e-7, 0.1]])
    assert label_ranks(scores, np.array([0, 0, 0, 0])).tolist() == [0, 1, 2, 1]


def test_label_ranks_refuse_labels_and_scores_that_mean_nothing():
    with pytest.raises(ValueError, match="labels must be in"):
        label_ranks(np.zeros((1, 3)), np.array([3]))
    with pytest.raises(ValueError, match="not finite"):
        label_ranks(np.array([[0.0, np.nan]]), np.array([0]))


def test_mean_per_class_weighs_classes_alike():
    # Class 0: 3 of 4; class 2: 0 of 1; class 1 has no sample.
    hits = np.array([True, True, True, False, False])
    found = mean_per_class(hits, np.array([0, 0, 0, 0, 2]), seed=0)
    assert found["value"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["n"] == 5
    low, high = found["interval"]
    assert 0.0 <= low < 3 / 8 < high <= 0.5


def test_mcnemar_is_that_worked_by_hand():
    # A alone right 1 time, B alone 5 times: 2 * (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64.
    a = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    b = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    found = mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (1, 5)
    assert found["p"] == pytest.approx(14 / 64)


def test_mcnemar_of_models_that_agree_is_one():
    hits = np.array([True, False])
    assert mcnemar(hits, hits) == {"only_a": 0, "only_b": 0, "p": 1.0}


def test_aupr_is_that_worked_by_hand():
    # By score: + - + -, so that precision is 1 at the first positive and 2 / 3 at the second.
    found = aupr(np.array([0.9, 0.5]), np.array([0.7, 0.1]), seed=0)
    assert found["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert (found["n"], found["num_positive"]) == (4, 2)


def test_aupr_is_scikit_learns_average_precision_ties_included():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 40) / 8, rng.integers(0, 7, 70) / 8
    truth = np.repeat([1, 0], [40, 70])
    found = aupr(positive, negative, seed=0)
    assert found["value"] == pytest.approx(average_precision_score(truth, np.concatenate([positive, negative])))
    drawn = [
        average_precision_score(truth, np.concatenate([rng.choice(positive, 40), rng.choice(negative, 70)]))
        for _ in range(100)
    ]
    # Two bootstraps of one quantity, 1,000 and 100 draws.
    assert found["interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.05)


def test_aupr_of_equal_scores_is_the_share_of_positives():
    assert aupr(np.zeros(2), np.zeros(10), seed=0)["value"] == pytest.approx(2 / 12)


def test_doubt_is_less_the_largest_probability():
    assert doubt(np.log([[3.0, 1.0], [1.0, 1.0]])) == pytest.approx([-0.75, -0.5])


def test_share_carries_its_n_and_interval():
    found = share(5, 10)
    assert (found["value"], found["n"]) == (0.5, 10)
    assert found["interval"] == pytest.approx([0.2366, 0.7634], abs=5e-5)
