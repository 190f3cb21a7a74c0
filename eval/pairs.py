"""Two models on the same questions: what one does better, drawn picture by picture, and where they disagree."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from eval.compare import compare
from eval.records import Found, of_benchmark
from eval.tables import comparison_table, table
from eval.task_scores import difference, metric_of, score


class Disagreement(NamedTuple):
    """A question that two models got different scores on, as lines of their samples.jsonl."""

    a: dict[str, Any]
    b: dict[str, Any]
    score_a: float
    score_b: float


def pairs(records: Sequence[Found]) -> Iterator[tuple[Found, Found]]:
    """Pairs that are worth comparing: two models shown the same kind of pictures, or one with its own and others."""
    for a, b in combinations(of_benchmark(records, "lmms_eval"), 2):
        same_model = a.content["model"].get("name") == b.content["model"].get("name")
        if a.pictures == b.pictures == "own" or (same_model and "own" in (a.pictures, b.pictures)):
            yield (b, a) if b.pictures == "own" != a.pictures else (a, b)


def differences_table(a: Found, b: Found, *, seed: int) -> str:
    """The difference of every metric that both have; "" if they share no task."""
    rows = []
    for task in a.result:
        if task not in b.result:
            continue
        if not same_questions(a, b, task):
            rows.append([task, "not compared: other questions", *[""] * 6])
            continue
        for name, value_a in a.result[task]["metrics"].items():
            value_b = b.result[task]["metrics"].get(name)
            metrics = (
                None if value_b is None else metric_of(name, value_a, a.samples[task]),
                None if value_b is None else metric_of(name, value_b, b.samples[task]),
            )
            if metrics[0] is None or metrics[1] is None:
                continue
            found = difference(*metrics, seed=seed)
            interval = found["interval"]
            shown = "no interval" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
            clear = "" if interval is None or interval[0] <= 0 <= interval[1] else "yes"
            cells = [f"{found['a']:.4f}", f"{found['b']:.4f}", f"{found['value']:+.4f} {shown}", clear]
            rows.append([task, name, *cells, str(a.result[task]["n"]), str(found["units"])])
    header = ["task", "metric", "A", "B", "B - A (95 % interval)", "clear of 0", "questions", "drawn units"]
    return table(header, rows) if rows else ""


def different_settings(a: Found, b: Found) -> list[str]:
    """Settings of two runs that are not alike, but for where the data lie."""
    names = (a.settings.keys() | b.settings.keys()) - {"data", "include_path", "suite", "tasks", "batch_size"}
    return sorted(name for name in names if a.settings.get(name) != b.settings.get(name))


def same_questions(a: Found, b: Found, task: str) -> bool:
    """Whether two records of a task are over the same questions, as with another --limit they are not."""
    asked = [[(line["doc_id"], line["doc"], line["target"]) for line in of.samples[task]] for of in (a, b)]
    return asked[0] == asked[1]


def disagreements(a: Found, b: Found, task: str, *, number: int, seed: int) -> list[Disagreement]:
    """Questions on which the scores differ most, drawn where there are more than `number`; none of others' questions.

    The score is that of the first metric that scores single questions.
    """
    found: list[Disagreement] = []
    if not same_questions(a, b, task):
        return found
    for line_a, line_b in zip(a.samples[task], b.samples[task], strict=True):
        for name, payload in line_a["metrics"].items():
            scores = score(payload), score(line_b["metrics"].get(name))
            if scores[0] is not None and scores[1] is not None:
                if scores[0] != scores[1]:
                    found.append(Disagreement(line_a, line_b, *scores))
                break
    order = np.random.default_rng(seed).permutation(len(found))
    drawn = sorted((found[index] for index in order), key=lambda pair: -abs(pair.score_a - pair.score_b))[:number]
    return sorted(drawn, key=lambda pair: (pair.score_a < pair.score_b, pair.a["doc_id"]))


def encoder_comparisons(records: Sequence[Found], *, seed: int) -> Iterator[tuple[str, str]]:
    """(title, table) for each two records of eval.retrieval, or of eval.zero_shot, over the same samples."""
    for benchmark in ("retrieval", "zero_shot"):
        for a, b in combinations(of_benchmark(records, benchmark), 2):
            hashes = [record.content.get("questions_sha256") for record in (a, b)]
            if hashes[0] is not None and hashes[0] == hashes[1]:
                title = f"{benchmark}: A = {a.name}, B = {b.name}"
                yield title, comparison_table(compare(a.file, b.file, seed=seed))
