"""Metrics of lmms-eval as ratios of sums, against its own aggregations, and what two models differ by."""

import numpy as np
import pytest
from lmms_eval.tasks.mme.utils import mme_aggregate_results
from lmms_eval.tasks.mmstar.utils import mmstar_aggregate_results
from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_aggregate_precision, pope_aggregate_recall

from eval.task_scores import difference, metric_of
from vision_moe.intervals import bootstrap_ratio_difference_interval, bootstrap_ratio_interval


def _lines(name, payloads, **docs):
    columns = [dict(zip(docs, row, strict=True)) for row in zip(*docs.values(), strict=True)] or [{}] * len(payloads)
    return [
        {"doc_id": index, "doc": doc, "metrics": {name: payload}}
        for index, (payload, doc) in enumerate(zip(payloads, columns, strict=True))
    ]


def _mme(scores):
    """Two questions about each of six pictures, of two categories; one category has four pictures."""
    return [
        {"question_id": str(index // 2), "category": "OCR" if index < 4 else "color", "score": float(score)}
        for index, score in enumerate(scores)
    ]


def test_mme_is_accuracy_and_accuracy_plus_summed_over_categories():
    payloads = _mme([1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1])
    value = mme_aggregate_results(payloads)
    # OCR: pictures of 200 and 50, so 125; color: 200, 0, 50, 200, so 112.5.
    assert value == 237.5
    metric = metric_of("mme_perception_score", value, _lines("mme_perception_score", payloads))
    assert metric.value == pytest.approx(237.5)
    assert metric.numerators_RN.shape[0] == 2


def test_mmstar_is_the_mean_of_its_categories():
    payloads = [{"question_id": i, "l2_category": "a" if i < 3 else "b", "score": float(i in (0, 3))} for i in range(4)]
    value = mmstar_aggregate_results(payloads)
    assert value == pytest.approx((1 / 3 + 1) / 2)
    assert metric_of("average", value, _lines("average", payloads)).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "aggregate"),
    [
        ("pope_f1_score", pope_aggregate_f1_score),
        ("pope_precision", pope_aggregate_precision),
        ("pope_recall", pope_aggregate_recall),
    ],
)
def test_pope_scores_are_lmms_evals_with_answers_that_are_neither_yes_nor_no(name, aggregate):
    answers = ["yes", "yes", "no", "maybe", "no", "yes", "no", "unclear"]
    truths = ["yes", "no", "yes", "yes", "no", "yes", "no", "no"]
    payloads = [
        {"score": float(a == t), "prediction": a, "ground_truth": t} for a, t in zip(answers, truths, strict=True)
    ]
    assert metric_of(name, aggregate(payloads), _lines(name, payloads)).value == pytest.approx(aggregate(payloads))


def test_questions_about_one_picture_are_drawn_together():
    scores = [1, 1, 1, 0, 0, 0] * 100
    pictures = [str(index // 3) for index in range(600)]
    apart = metric_of("exact_match", 0.5, _lines("exact_match", scores))
    together = metric_of("exact_match", 0.5, _lines("exact_match", scores, image_id=pictures))
    assert (len(apart.units), len(together.units)) == (600, 200)
    widths = [high - low for low, high in (apart.interval(seed=0), together.interval(seed=0))]
    # A third of the independent draws: wider by the root of three.
    assert widths[1] / widths[0] == pytest.approx(3**0.5, rel=0.15)


def test_scale_is_found_and_what_is_no_mean_has_no_interval():
    lines = _lines("gpt_eval_score", [{"score": 0.5}, {"score": 1.0}])
    assert metric_of("gpt_eval_score", 75.0, lines).scale == 100
    assert metric_of("gpt_eval_score", 80.0, lines) is None
    assert metric_of("gpt_eval_score", 75.0, _lines("gpt_eval_score", [{"text": "a"}, {"text": "b"}])) is None
    assert metric_of("missing", 75.0, lines) is None


def test_too_few_questions_for_an_interval_give_none():
    payloads = _mme([1, 1, 1, 1, 0, 0])
    lines = _lines("mme_perception_score", payloads)
    assert metric_of("mme_perception_score", 200.0, lines).interval(seed=0) is None


def test_difference_is_paired_and_refuses_other_units():
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    # B fails where A fails, but for ten questions.
    a, b = hard.astype(float), hard.astype(float)
    b[np.flatnonzero(~hard)[:10]] = 1.0
    metrics = [metric_of("exact_match", of.mean(), _lines("exact_match", list(of))) for of in (a, b)]
    found = difference(*metrics, seed=0)
    assert found["value"] == pytest.approx(10 / 400)
    # Ten more, give or take twice the root of ten; the intervals of A and B are eight times as wide.
    assert 0.005 < found["interval"][0] < found["value"] < found["interval"][1] < 0.045
    assert metrics[0].interval(seed=0)[1] > metrics[1].interval(seed=0)[0]
    fewer = metric_of("exact_match", a[:399].mean(), _lines("exact_match", list(a[:399])))
    with pytest.raises(ValueError, match="same pictures"):
        difference(metrics[0], fewer, seed=0)


def test_difference_interval_of_ratios_draws_equal_units_for_both():
    rng = np.random.default_rng(1)
    numerators, denominators = rng.random((2, 50)), rng.random((2, 50)) + 1
    same = (numerators, denominators)
    assert bootstrap_ratio_difference_interval(same, same, seed=3) == (0.0, 0.0)
    zero = (np.zeros_like(numerators), denominators)
    expected = bootstrap_ratio_interval(numerators, denominators, seed=3)
    assert bootstrap_ratio_difference_interval(zero, same, seed=3) == pytest.approx(expected)
