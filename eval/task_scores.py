"""What a metric of a task is, question by question: for its interval, and to compare two models pair by pair.

lmms-eval returns one number a metric, and for every question what its aggregation was given. A metric is taken for a
mean of R ratios of sums over N units (accuracy: R = 1; MMStar: a ratio for each category) where that gives its number
again. What gives it by none of the forms below, such as what a judge says in the end, has no interval here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vision_moe.intervals import bootstrap_ratio_difference_interval, bootstrap_ratio_interval

# Fields of a document that name its picture, in the data sets of lmms-eval: the questions about one picture are not
# independent, and are drawn together.
_PICTURE_FIELDS = ("image_source", "image_id", "imageId")

Sample = dict[str, Any]


class Metric(NamedTuple):
    """A metric as the mean of R ratios of sums over N units, times scale.

    Attributes:
        numerators_RN: what each unit adds.
        denominators_RN: what it adds to the denominator.
        scale: of the reported number: 1, 100, or with MME the number of its categories.
        units: names of the N units: the pictures where they are known, else the questions.
    """

    numerators_RN: NDArray[np.float64]
    denominators_RN: NDArray[np.float64]
    scale: float
    units: tuple[str, ...]

    @property
    def value(self) -> float:
        """The number that lmms-eval reports."""
        return self.scale * float((self.numerators_RN.sum(axis=1) / self.denominators_RN.sum(axis=1)).mean())

    def interval(self, *, seed: int) -> list[float] | None:
        """95 % bootstrap interval over the units; None where they are so few that a drawing can miss a ratio whole."""
        with np.errstate(invalid="ignore"):
            interval = bootstrap_ratio_interval(self.numerators_RN, self.denominators_RN, seed=seed)
        return [self.scale * end for end in interval] if np.isfinite(interval).all() else None


def metric_of(name: str, value: float, samples: Sequence[Sample]) -> Metric | None:
    """The metric of these samples that has this value, or None if it is of none of the known forms.

    Args:
        name: of the metric.
        value: that lmms-eval reports.
        samples: lines of samples.jsonl of one task.
    """
    answered = [sample for sample in samples if name in sample["metrics"]]
    if not answered:
        return None
    payloads = [sample["metrics"][name] for sample in answered]
    rows = (_FORMS.get(name) or _mean)(payloads)
    if rows is None:
        return None
    numerators_NR, denominators_NR, scales = rows
    units = [_unit(sample) for sample in answered]
    number_of = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    index_N = np.array([number_of[unit] for unit in units])
    numerators, denominators = np.zeros((2, len(number_of), numerators_NR.shape[1]))
    np.add.at(numerators, index_N, numerators_NR)
    np.add.at(denominators, index_N, denominators_NR)
    if not denominators.sum(axis=0).all():
        return None
    for scale in scales:
        found = Metric(numerators.T, denominators.T, scale, tuple(number_of))
        if math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-9):
            return found
    return None


def difference(a: Metric, b: Metric, *, seed: int) -> dict[str, Any]:
    """What B is better by, on the same units.

    Returns:
        {"a", "b", "value": b - a, "interval", "units"}: the 95 % bootstrap interval of the difference, in which the
        units are drawn once for both, or None as in `Metric.interval`.

    Raises:
        ValueError: the two are not over the same units.
    """
    if a.units != b.units or a.numerators_RN.shape != b.numerators_RN.shape:
        raise ValueError("the two models were not asked about the same pictures")
    with np.errstate(invalid="ignore"):
        ends = bootstrap_ratio_difference_interval(
            (a.numerators_RN, a.denominators_RN), (b.numerators_RN, b.denominators_RN), seed=seed
        )
    interval = [a.scale * end for end in ends] if np.isfinite(ends).all() else None
    return {"a": a.value, "b": b.value, "value": b.value - a.value, "interval": interval, "units": len(a.units)}


def score(payload: Any) -> float | None:
    """What one question got: the number itself, or the "score" among what a task keeps."""
    if isinstance(payload, dict):
        if "score" in payload:
            payload = payload["score"]
        elif {"pred", "answer"} <= payload.keys():
            payload = str(payload["pred"]).lower().strip() == str(payload["answer"]).lower().strip()
    return float(payload) if isinstance(payload, bool | int | float) else None


def _unit(sample: Sample) -> str:
    field = next((name for name in _PICTURE_FIELDS if name in sample["doc"]), None)
    return f"question {sample['doc_id']}" if field is None else str(sample["doc"][field])


Rows = tuple[NDArray[np.float64], NDArray[np.float64], Iterable[float]]


def _mean(payloads: list[Any]) -> Rows | None:
    """The mean over the questions, or with MMStar the mean of its categories' means."""
    scores = [score(payload) for payload in payloads]
    if any(value is None or not math.isfinite(value) for value in scores):
        return None
    values_N1 = np.array(scores, dtype=np.float64)[:, None]
    weights_N1 = np.ones_like(values_N1)
    if isinstance(payloads[0], dict) and "l2_category" in payloads[0]:
        return _spread(values_N1, weights_N1, [payload["l2_category"] for payload in payloads], (1.0, 100.0))
    return values_N1, weights_N1, (1.0, 100.0)


def _mme(payloads: list[Any]) -> Rows | None:
    """MME: the sum over its categories of accuracy and "accuracy+", both questions about a picture right (in %)."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for index, payload in enumerate(payloads):
        pairs.setdefault((payload["category"], payload["question_id"]), []).append(index)
    values_N1 = np.zeros((len(payloads), 1))
    weights_N1 = np.zeros((len(payloads), 1))
    for indices in pairs.values():
        scores = [payloads[index]["score"] for index in indices]
        # A pair's whole value stands at the first of its questions.
        values_N1[indices[0]] = 100 * (sum(scores) / 2 + (sum(scores) == 2))
        weights_N1[indices[0]] = 1
    categories = [payload["category"] for payload in payloads]
    return _spread(values_N1, weights_N1, categories, (float(len(set(categories))),))


def _spread(
    values_N1: NDArray[np.float64],
    weights_N1: NDArray[np.float64],
    categories: list[str],
    scales: Iterable[float],
) -> Rows:
    """One ratio for each category."""
    names = sorted(set(categories))
    member_NR = np.array([[name == category for name in names] for category in categories], dtype=np.float64)
    return values_N1 * member_NR, weights_N1 * member_NR, scales


def _yes_no(numerator: tuple[float, ...], denominator: tuple[float, ...]) -> Any:
    """A ratio of weighted counts of (true yes, false yes, false no)."""

    def rows(payloads: list[Any]) -> Rows:
        pairs = [(payload["prediction"], payload["ground_truth"]) for payload in payloads]
        kinds_N3 = np.array(
            [[pair == kind for kind in (("yes", "yes"), ("yes", "no"), ("no", "yes"))] for pair in pairs]
        )
        return kinds_N3 @ np.array([numerator]).T, kinds_N3 @ np.array([denominator]).T, (1.0,)

    return rows


# Metrics of lmms-eval that are no plain mean, by their names there.
_FORMS = {
    "mme_perception_score": _mme,
    "mme_cognition_score": _mme,
    "pope_precision": _yes_no((1, 0, 0), (1, 1, 0)),
    # lmms-eval leaves answers that are neither yes nor no out of the recall.
    "pope_recall": _yes_no((1, 0, 0), (1, 0, 1)),
    "pope_f1_score": _yes_no((2, 0, 0), (2, 1, 1)),
    # Of the truths: it says nothing about a model.
    "pope_yes_ratio": lambda payloads: None,
}
