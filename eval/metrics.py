"""Scores of answers and labels, pure functions of sequences and arrays; retrieval's: vision_moe.retrieval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from vision_moe.intervals import bootstrap_mean_share_interval, wilson_interval
from vision_moe.retrieval import TIE


def label_ranks(scores_NC: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """How many of C classes stand before the label of each of N samples, int64[N]; a tie counts against the label.

    Args:
        scores_NC: float[N, C], cosines: those within `vision_moe.retrieval.TIE` of each other are equal.
        labels_N: int[N], the right classes.

    Raises:
        ValueError: if a score is not finite or a label is no class.
    """
    num_classes = scores_NC.shape[1]
    if not np.isfinite(scores_NC).all():
        raise ValueError("a score is not finite, and comparisons with it mean nothing")
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), but got {labels_N.min()}..{labels_N.max()}")
    own_N1 = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)
    # The label reaches its own score, hence the 1.
    ranks_N: NDArray[np.int64] = (scores_NC >= own_N1 - TIE).sum(axis=1) - 1
    return ranks_N


def mean_per_class(hits_N: NDArray[np.bool_], labels_N: NDArray[np.integer[Any]], *, seed: int) -> dict[str, Any]:
    """Mean over the classes that have samples of each one's share of hits, in the form of `share`.

    The interval is a bootstrap within classes, and n the number of samples.
    """
    sizes_C = np.bincount(labels_N)
    hits_C = np.bincount(labels_N[hits_N], minlength=len(sizes_C))
    seen = sizes_C > 0
    interval = bootstrap_mean_share_interval(hits_C[seen], sizes_C[seen], seed=seed)
    return {
        "value": float((hits_C[seen] / sizes_C[seen]).mean()),
        "n": len(labels_N),
        "interval": list(interval),
    }


def share(hits: int, n: int) -> dict[str, Any]:
    """{"value": hits / n, "n", "interval": [low, high]} with Wilson's 95 % interval."""
    return {"value": hits / n, "n": n, "interval": list(wilson_interval(hits, n))}


def mcnemar(a_N: NDArray[np.bool_], b_N: NDArray[np.bool_]) -> dict[str, Any]:
    """McNemar's exact test of two classifiers on the same N independent samples (McNemar 1947).

    Args:
        a_N: whether A is right.
        b_N: whether B is right.

    Returns:
        {"only_a", "only_b", "p"}: samples that one alone has right, and the two-sided p-value of their being even.

    Raises:
        ValueError: if the lengths differ.
    """
    if a_N.shape != b_N.shape:
        raise ValueError(f"need as many samples of both, but got {a_N.shape} and {b_N.shape}")
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def aupr(
    positive_P: NDArray[np.floating[Any]],
    negative_Q: NDArray[np.floating[Any]],
    *,
    seed: int,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Area under the precision-recall curve, as average precision, of scores that should be high for positives.

    Returns:
        {"value", "n": P + Q, "num_positive": P, "interval"}; the interval is a bootstrap within either kind.
    """
    scores_N = np.concatenate([positive_P, negative_Q])
    order_N = scores_N.argsort()[::-1]
    positive_N = order_N < len(positive_P)
    # Samples of one score pass the threshold together.
    last_N = np.append(np.diff(scores_N[order_N]) != 0, True)

    def area(times_drawn_N: NDArray[np.int64]) -> float:
        taken, right = (np.cumsum(times)[last_N] for times in (times_drawn_N, times_drawn_N * positive_N))
        precision = right / np.maximum(taken, 1)
        return float((np.diff(right, prepend=0) * precision).sum() / len(positive_P))

    rng = np.random.default_rng(seed)
    ends = (0, len(positive_P)), (len(positive_P), len(scores_N))
    areas = []
    for _ in range(num_resamples):
        drawn = np.concatenate([rng.integers(start, stop, size=stop - start) for start, stop in ends])
        areas.append(area(np.bincount(drawn, minlength=len(scores_N))[order_N]))
    return {
        "value": area(np.ones(len(scores_N), dtype=np.int64)),
        "n": len(scores_N),
        "num_positive": len(positive_P),
        "interval": np.quantile(areas, [0.025, 0.975]).tolist(),
    }


def yes_no_scores(predictions: Sequence[str], truths: Sequence[str]) -> dict[str, Any]:
    """POPE's scores (Li et al. 2023) of answers that must be exactly "yes" or "no" after lower-casing.

    "yes" is the positive class. An answer that is neither is wrong, counts as no prediction of "yes", and is
    reported in "unparsed": a model that says "Yes, there is" fails on form and not on sight. lmms-eval's
    pope_recall leaves such answers out instead, so that its recall and F1 rise with them; ours do not.

    Args:
        predictions: N answers.
        truths: N times "yes" or "no".

    Returns:
        {"accuracy": {"value", "n", "interval"}, "precision", "recall", "f1", "yes_ratio", "true_yes_ratio",
        "unparsed"}; ratios in [0, 1]. yes_ratio is of the predictions, and unbiased where it equals
        true_yes_ratio, which is what lmms-eval's pope_yes_ratio counts.

    Raises:
        ValueError: if lengths differ, there is no answer, or a truth is neither "yes" nor "no".
    """
    if len(predictions) != len(truths) or not truths:
        raise ValueError(f"need as many truths as answers, and some: got {len(predictions)} and {len(truths)}")
    wrong = sorted(set(truths) - {"yes", "no"})
    if wrong:
        raise ValueError(f'truths must be "yes" or "no", but got {wrong[:5]}')
    said = [answer.strip().lower() for answer in predictions]
    pairs = list(zip(said, truths, strict=True))
    true_yes = sum(pair == ("yes", "yes") for pair in pairs)
    said_yes, are_yes = said.count("yes"), list(truths).count("yes")
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / are_yes if are_yes else 0.0
    return {
        "accuracy": share(sum(answer == truth for answer, truth in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": said_yes / len(pairs),
        "true_yes_ratio": are_yes / len(pairs),
        "unparsed": sum(answer not in ("yes", "no") for answer in said) / len(pairs),
    }
