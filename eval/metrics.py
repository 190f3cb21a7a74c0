"""Scores of answers and labels, pure functions of sequences and arrays; retrieval's: vision_moe.retrieval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_moe.intervals import wilson_interval


def top_k_hits(scores_NC: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]], k: int) -> int:
    """How many of N samples have their label among the k best of C classes; a tie counts against the label.

    Raises:
        ValueError: if k is not in [1, C], a score is not finite or a label is no class.
    """
    num_classes = scores_NC.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must be in [1, {num_classes}] (the number of classes), but got {k}")
    if not np.isfinite(scores_NC).all():
        raise ValueError("a score is not finite, and comparisons with it mean nothing")
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), but got {labels_N.min()}..{labels_N.max()}")
    own_N1 = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)
    ahead_N = (scores_NC >= own_N1).sum(axis=1) - 1
    return int((ahead_N < k).sum())


def share(hits: int, n: int) -> dict[str, Any]:
    """{"value": hits / n, "n", "interval": [low, high]} with Wilson's 95 % interval."""
    return {"value": hits / n, "n": n, "interval": list(wilson_interval(hits, n))}


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
