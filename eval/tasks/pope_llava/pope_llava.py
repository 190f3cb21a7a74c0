"""LLaVA's scoring of POPE. lmms-eval loads this file by its path."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any


def parse(answer: str) -> str:
    """Answer -> "yes" or "no", by the rule of LLaVA's eval_pope.py; what says neither is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The item of each metric: the split, what was said and what is true.

    Raises:
        ValueError: the truth is neither yes nor no.
    """
    truth = doc["answer"].strip().lower()
    if truth not in ("yes", "no"):
        raise ValueError(f'question {doc["question_id"]} must have the answer "yes" or "no", but has {truth!r}')
    said = parse(results[0])
    item = {"category": doc["category"], "prediction": said, "ground_truth": truth, "score": float(said == truth)}
    return dict.fromkeys(("f1", "accuracy", "precision", "recall", "yes_ratio", f"f1_{doc['category']}"), item)


def scores(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """F1, accuracy, precision, recall and yes ratio of one split, in [0, 1]; "yes" is the positive class."""
    pairs = [(item["prediction"], item["ground_truth"]) for item in items]
    true_yes = pairs.count(("yes", "yes"))
    said_yes = true_yes + pairs.count(("yes", "no"))
    are_yes = true_yes + pairs.count(("no", "yes"))
    return {
        "f1": 2 * true_yes / (said_yes + are_yes) if said_yes + are_yes else 0.0,
        "accuracy": sum(said == truth for said, truth in pairs) / len(pairs),
        "precision": true_yes / said_yes if said_yes else 0.0,
        "recall": true_yes / are_yes if are_yes else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }


def mean_f1(items: Sequence[dict[str, Any]]) -> float:
    """Mean over splits, as all below."""
    return _mean("f1", items)


def mean_accuracy(items: Sequence[dict[str, Any]]) -> float:
    return _mean("accuracy", items)


def mean_precision(items: Sequence[dict[str, Any]]) -> float:
    return _mean("precision", items)


def mean_recall(items: Sequence[dict[str, Any]]) -> float:
    return _mean("recall", items)


def mean_yes_ratio(items: Sequence[dict[str, Any]]) -> float:
    return _mean("yes_ratio", items)


def _mean(name: str, items: Sequence[dict[str, Any]]) -> float:
    splits = defaultdict(list)
    for item in items:
        splits[item["category"]].append(item)
    return fmean(scores(of)[name] for of in splits.values())
