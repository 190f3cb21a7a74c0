"""What lmms-eval returned for a task -> what a record says of it, and the lines of samples.jsonl."""

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from eval.metrics import yes_no_scores
from eval.task_scores import metric_of
from mllm.lmms_tasks import numbers

logger = logging.getLogger(__name__)

# What lmms-eval keeps of every question; its other keys are the metrics, with what their aggregations were given.
_COMMON = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"}
)
# Who judges, by lmms-eval's own variables. A key is none of them.
_JUDGE_VARIABLES = ("API_TYPE", "MODEL_VERSION")
_JUDGE_URLS = ("OPENAI_API_URL", "LLM_JUDGE_URL")
# Tasks whose aggregation asks a judge by itself, without lmms-eval's counting.
_UNCOUNTED = frozenset({"mmbench_en_dev", "mmbench_cn_dev", "mmbench_cn_cc"})


def summarize(found: dict[str, Any], *, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What lmms-eval returned for a task or a group.

    Args:
        found: as `mllm.lmms_tasks.run_task` returns it.
        seed: of the intervals.

    Returns:
        (per task: metrics with intervals, n, and how the numbers came about; lines of samples.jsonl).

    Raises:
        ValueError: there is no task, or a task has no numeric result, one that is not finite, or fewer answers than
            questions.
    """
    if not found.get("samples"):
        raise ValueError("lmms-eval returned no samples")
    results, lines = {}, []
    for task, samples in found["samples"].items():
        own = [_line(task, sample) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        results[task] = _summary(task, own, found, seed)
        lines += own
    return results, lines


def _summary(task: str, lines: list[dict[str, Any]], found: dict[str, Any], seed: int) -> dict[str, Any]:
    metrics, others = numbers(task, found)
    expected = found["n-samples"][task]["effective"]
    if len(lines) != expected or not lines:
        raise ValueError(f"task {task} has {len(lines)} answers to {expected} questions")
    if others:
        logger.warning("task %s: no number for %s", task, ", ".join(others))
    parsed = {name: metric_of(name, value, lines) for name, value in metrics.items()}
    config = found["configs"][task]
    return {
        "metrics": metrics,
        "intervals": {name: metric.interval(seed=seed) for name, metric in parsed.items() if metric is not None},
        "n": len(lines),
        "units": next((len(metric.units) for metric in parsed.values() if metric is not None), None),
        "without_number": others,
        "first_prompt": lines[0]["prompt"],
        "prompts": config.get("lmms_eval_specific_kwargs"),
        "generation_kwargs": config.get("generation_kwargs"),
        "parser": _parser(config),
        "protocol": _metadata(config).get("protocol"),
        "judge": _metadata(config).get("judge") or _judge(task, found),
        "version": found["versions"].get(task),
        **_yes_no(lines),
    }


def _line(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc": sample["doc"],
        "prompt": sample["arguments"][0],
        "target": sample["target"],
        "answer": sample["filtered_resps"][0],
        "metrics": {name: value for name, value in sample.items() if name not in _COMMON},
    }


def _parser(config: dict[str, Any]) -> dict[str, Any]:
    """The functions between an answer and a number, by name; their code is that of lmms-eval's version, or ours."""
    shown = {key: config[key] for key in ("process_results", "filter_list", "metric_list") if key in config}
    named = {key: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for key, value in shown.items()}
    return {"about": _metadata(config).get("parser"), **named}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What a task's YAML says of itself; lmms-eval has it as a mapping in some and as a list of one in others."""
    metadata = config.get("metadata") or {}
    return metadata if isinstance(metadata, dict) else metadata[0]


def _judge(task: str, found: dict[str, Any]) -> dict[str, Any] | None:
    """Who judged, as far as the environment says, and how often it was asked; None if nobody did."""
    asked = found.get("usage", {}).get("by_source", {}).get("judge")
    if not asked and task not in _UNCOUNTED:
        return None
    settings = {name: os.environ[name] for name in _JUDGE_VARIABLES if name in os.environ}
    for name in _JUDGE_URLS:
        if name in os.environ:
            parts = urlsplit(os.environ[name])
            settings[name] = f"{parts.scheme}://{parts.hostname}{parts.path}"
    return {**settings, "num_calls": asked["n_api_calls"] if asked else None}


def _yes_no(lines: list[dict[str, Any]]) -> dict[str, Any]:
    truths = [str(line["target"]).strip().lower() for line in lines]
    if not set(truths) <= {"yes", "no"}:
        return {}
    answers = [str(line["answer"]) for line in lines]
    categories = [line["doc"].get("category") for line in lines]
    by_category = {}
    for category in sorted({name for name in categories if name}):
        rows = [index for index, name in enumerate(categories) if name == category]
        by_category[category] = yes_no_scores([answers[i] for i in rows], [truths[i] for i in rows])
    return {"yes_no": {**yes_no_scores(answers, truths), "by_category": by_category}}
