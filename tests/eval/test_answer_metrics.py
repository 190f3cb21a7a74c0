"""Scores of yes/no answers and of class scores, against examples worked by hand."""

import numpy as np
import pytest

from eval.metrics import share, top_k_hits, yes_no_scores


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


def test_top_k_counts_ties_against_the_label():
    scores = np.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    labels = np.array([0, 0, 0])
    assert [top_k_hits(scores, labels, k) for k in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(("labels", "k", "match"), [([3], 1, "labels"), ([0], 0, "k must"), ([0], 4, "k must")])
def test_top_k_refuses_values_out_of_range(labels, k, match):
    with pytest.raises(ValueError, match=match):
        top_k_hits(np.zeros((1, 3)), np.array(labels), k)


def test_share_carries_its_n_and_interval():
    found = share(5, 10)
    assert (found["value"], found["n"]) == (0.5, 10)
    assert found["interval"] == pytest.approx([0.2366, 0.7634], abs=5e-5)
