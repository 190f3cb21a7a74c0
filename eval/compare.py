"""Two models on the same samples: `python -m eval.compare A.json B.json`, records of eval.retrieval or eval.zero_shot.

Two intervals that overlap say little: the models mostly fail on the same samples. What is drawn again here is the
difference, picture by picture. Shapes: N pictures.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics import mcnemar
from eval.record import read_record
from eval.tables import comparison_table
from vision_moe.command_help import CommandParser
from vision_moe.files import write_json
from vision_moe.intervals import bootstrap_ratio_interval, bootstrap_ratio_intervals
from vision_moe.retrieval import WAYS, Ranks, hits_by_picture

Samples = dict[str, NDArray[np.int64]]


def compare(path_a: Path, path_b: Path, *, seed: int = 0) -> dict[str, Any]:
    """What B does better than A.

    Args:
        path_a: record of model A.
        path_b: record of model B.
        seed: of the bootstrap.

    Returns:
        {"benchmark", "a", "b", "different_settings", "differences": {metric: {"a", "b", "value": b - a, "interval",
        "n"}}}: shares, and the 95 % bootstrap interval of the difference over pictures. Where the samples are
        independent there is McNemar's exact test too, "mcnemar": {"only_a", "only_b", "p"}: for accuracies and for
        image to text, but not for text to image, where the captions of a picture are asked together.

    Raises:
        FileNotFoundError, ValueError: a record or its samples are not there, or they are over other samples.
    """
    (a, samples_a), (b, samples_b) = read_record(path_a), read_record(path_b)
    kinds = {"retrieval": _retrieval, "zero_shot": _zero_shot}
    if a["benchmark"] != b["benchmark"] or a["benchmark"] not in kinds:
        raise ValueError(f"need two records of one of {', '.join(kinds)}, but got {a['benchmark']}, {b['benchmark']}")
    if a["questions_sha256"] != b["questions_sha256"]:
        raise ValueError(f"{path_a} and {path_b} are over other pictures, captions or classes; measure both on one set")
    # Where the data lie and what the intervals were drawn with may differ.
    shared = a["settings"].keys() - {"data", "seed"}
    differing = sorted(key for key in shared if a["settings"][key] != b["settings"].get(key))
    return {
        "benchmark": a["benchmark"],
        "a": a["model"],
        "b": b["model"],
        "different_settings": differing,
        "differences": kinds[a["benchmark"]](samples_a, samples_b, seed),
    }


def _retrieval(a: Samples, b: Samples, seed: int) -> dict[str, Any]:
    image_of_text_M = a["image_of_text"]
    ranks_a, ranks_b = (Ranks(of["image_to_text_rank"], of["text_to_image_rank"]) for of in (a, b))
    found: dict[str, Any] = {}
    for k in (1, 5, 10):
        hits_a_2N, questions_2N = hits_by_picture(ranks_a, image_of_text_M, k)
        hits_b_2N, _ = hits_by_picture(ranks_b, image_of_text_M, k)
        intervals = bootstrap_ratio_intervals(hits_b_2N - hits_a_2N, questions_2N, seed=seed)
        for row, (way, interval) in enumerate(zip(WAYS, intervals, strict=True)):
            n = int(questions_2N[row].sum())
            share_a, share_b = hits_a_2N[row].sum() / n, hits_b_2N[row].sum() / n
            found[f"{way.replace('_', ' ')} R@{k}"] = _difference(share_a, share_b, interval, n)
        test = mcnemar(ranks_a.image_to_text < k, ranks_b.image_to_text < k)
        found[f"image to text R@{k}"]["mcnemar"] = test
    hits_a_2N, questions_2N = hits_by_picture(ranks_a, image_of_text_M, 1)
    hits_b_2N, _ = hits_by_picture(ranks_b, image_of_text_M, 1)
    interval = bootstrap_ratio_interval(hits_b_2N - hits_a_2N, questions_2N, seed=seed)
    mean_a, mean_b = ((hits_2N.sum(axis=1) / questions_2N.sum(axis=1)).mean() for hits_2N in (hits_a_2N, hits_b_2N))
    found["mean R@1"] = _difference(mean_a, mean_b, interval, len(ranks_a.image_to_text))
    return found


def _zero_shot(a: Samples, b: Samples, seed: int) -> dict[str, Any]:
    num_classes = int(a["label"].max()) + 1
    found = {}
    for k in (1, 5):
        if k < num_classes:
            hits_a_N, hits_b_N = a["rank"] < k, b["rank"] < k
            difference_1N = (hits_b_N.astype(np.float64) - hits_a_N)[None]
            interval = bootstrap_ratio_interval(difference_1N, np.ones_like(difference_1N), seed=seed)
            entry = _difference(hits_a_N.mean(), hits_b_N.mean(), interval, len(hits_a_N))
            found[f"top-{k}"] = {**entry, "mcnemar": mcnemar(hits_a_N, hits_b_N)}
    return found


def _difference(a: float, b: float, interval: tuple[float, float], n: int) -> dict[str, Any]:
    return {"a": float(a), "b": float(b), "value": float(b - a), "interval": list(interval), "n": n}


def main(args: Sequence[str] | None = None) -> None:
    """The difference of every metric with its 95 % interval, and McNemar's exact test where it applies."""
    parser = CommandParser(__doc__, ".venv/bin/python -m eval.compare model_a.json model_b.json")
    parser.add_argument("a", type=Path, help="record that --output of eval.retrieval or eval.zero_shot wrote")
    parser.add_argument("b", type=Path, help="the same of the other model")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args(args)
    result = compare(options.a, options.b, seed=options.seed)
    sys.stdout.write(f"A: {result['a']['path']}\nB: {result['b']['path']}\n\n{comparison_table(result)}\n")
    if result["different_settings"]:
        sys.stdout.write(f"\nThe runs differ in {', '.join(result['different_settings'])} as well.\n")
    if options.output is not None:
        write_json(options.output, result)
        sys.stdout.write(f"\nwritten: {options.output}\n")


if __name__ == "__main__":
    main()
