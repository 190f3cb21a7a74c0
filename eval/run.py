"""lmms-eval in process: `python -m eval.run --model DIR --tasks A,B --output DIR`.

lmms-eval's own command ends with exit code 0 when a task failed. This one runs each task, writes what it got to
OUTPUT/results.json and OUTPUT/samples.jsonl, and exits non-zero when any result is missing.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from eval.metrics import yes_no_scores
from eval.record import record
from eval.report import tasks_table
from eval.tasks.pope_scenes.scenes import source
from mllm.lmms_adapter import VisionMoeLlava
from vision_moe.command_help import CommandParser
from vision_moe.files import replacing, write_json
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

TASKS = Path(__file__).resolve().parent / "tasks"


def task_manager(tasks: Sequence[str], include_path: Path = TASKS) -> TaskManager:
    """The index of `include_path`, and of lmms-eval's own tasks where one of them is asked for.

    Raises:
        ValueError: if a name is no task.
    """
    ours = TaskManager("WARNING", include_path=str(include_path), include_defaults=False)
    if set(tasks) <= set(ours.all_tasks):
        return ours
    # Indexing lmms-eval's own two thousand YAML files takes a while.
    everything = TaskManager("WARNING", include_path=str(include_path))
    unknown = sorted(set(tasks) - set(everything.all_tasks))
    if unknown:
        raise ValueError(
            f"unknown tasks {', '.join(unknown)}; ours are {', '.join(ours.all_tasks)}, and `lmms-eval tasks list` "
            "names the others"
        )
    return everything


def evaluate(
    lm: VisionMoeLlava,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    data: Path | None = None,
    limit: int | None = None,
    post_prompt: str | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    """Runs each task apart, so that one that fails takes no other's result with it.

    Args:
        lm: the model.
        tasks: names of tasks or groups that `manager` knows.
        manager: of `task_manager`.
        data: Scenes folder, for pope_scenes; None = the environment variable VISION_MOE_SCENES.
        limit: the first so many questions of each task; None = all.
        post_prompt: replaces what the tasks append to each question.
        seed: of everything that lmms-eval draws.

    Returns:
        (results by task, samples, reasons of failure by task).
    """
    results: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in tasks:
        try:
            found = simple_evaluate(
                model=lm,
                tasks=[_task(name, data, post_prompt)],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            summaries = summarize(found)
        except Exception as error:  # reported at the end, as a non-zero exit, once the other tasks have run
            logger.exception("task %s failed", name)
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        results |= summaries
        samples += [{"task": task, **_sample(sample)} for task in summaries for sample in found["samples"][task]]
    return results, samples, failed


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """What lmms-eval returned -> per task: metrics, n, first prompt, settings and, for yes/no tasks, our scores.

    Raises:
        ValueError: if there is no task, a task has no numeric result, one that is not finite, or fewer answers than
            questions.
    """
    if not found.get("samples"):
        raise ValueError("lmms-eval returned no samples")
    return {task: _summary(task, samples, found) for task, samples in found["samples"].items()}


def _summary(task: str, samples: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    numbers, others = {}, []
    for key, value in found["results"].get(task, {}).items():
        metric = key.partition(",")[0]
        if metric in ("alias", "samples") or "stderr" in metric or metric.endswith("_clt"):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[metric] = float(value)
        else:
            others.append(metric)
    expected = found["n-samples"][task]["effective"]
    if not numbers:
        raise ValueError(f"task {task} has no numeric result; without a number: {', '.join(others) or 'nothing'}")
    if not all(math.isfinite(value) for value in numbers.values()):
        raise ValueError(f"task {task} has a result that is not finite: {numbers}")
    if len(samples) != expected or not samples:
        raise ValueError(f"task {task} has {len(samples)} answers to {expected} questions")
    if others:
        logger.warning("task %s: no number for %s", task, ", ".join(others))
    config = found["configs"][task]
    return {
        "metrics": numbers,
        "n": len(samples),
        "without_number": others,
        "first_prompt": samples[0]["arguments"][0],
        "generation_kwargs": config.get("generation_kwargs"),
        "version": found["versions"].get(task),
        **_yes_no(samples),
    }


def _yes_no(samples: list[dict[str, Any]]) -> dict[str, Any]:
    truths = [str(sample["target"]).strip().lower() for sample in samples]
    if not set(truths) <= {"yes", "no"}:
        return {}
    answers = [str(sample["filtered_resps"][0]) for sample in samples]
    categories = [sample["doc"].get("category") for sample in samples]
    by_category = {}
    for category in sorted({name for name in categories if name}):
        rows = [index for index, name in enumerate(categories) if name == category]
        by_category[category] = yes_no_scores([answers[i] for i in rows], [truths[i] for i in rows])
    return {"yes_no": {**yes_no_scores(answers, truths), "by_category": by_category}}


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "doc_id": sample["doc_id"],
        "doc": sample["doc"],
        "prompt": sample["arguments"][0],
        "target": sample["target"],
        "answer": sample["filtered_resps"][0],
    }


def _task(name: str, data: Path | None, post_prompt: str | None) -> str | dict[str, Any]:
    changes: dict[str, Any] = {}
    if data is not None and name == "pope_scenes":
        if not (data / "pope_test.jsonl").is_file():
            raise FileNotFoundError(f"no pope_test.jsonl in {data}; `python -m vision_moe.data.scenes` writes it")
        changes |= source(data)
    if post_prompt is not None:
        changes["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": post_prompt}}
    return {"task": name, **changes} if changes else name


def _write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)


def _parser() -> CommandParser:
    parser = CommandParser(__doc__, ".venv/bin/python -m eval.run --model DIR --tasks pope_scenes --output pope")
    parser.add_argument("--model", required=True, help="folder of a model that mllm.train wrote")
    parser.add_argument("--tasks", required=True, help="names with commas between, such as pope_scenes")
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json and samples.jsonl")
    parser.add_argument("--data", type=Path, help="Scenes folder, for pope_scenes (default: $VISION_MOE_SCENES)")
    parser.add_argument("--limit", type=int, help="first so many questions of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, help="cap on what the tasks ask for")
    parser.add_argument("--post-prompt", help="replaces what the tasks append to each question")
    parser.add_argument("--blank-images", action="store_true", help="control: every picture becomes mean grey")
    parser.add_argument("--include-path", type=Path, default=TASKS, help="folder of task YAML files")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", help="of the weights (float32, bfloat16); default: the checkpoint's")
    parser.add_argument("--quantization", choices=["4bit", "8bit"], help="hold the language model in fewer bits")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Evaluates, writes, shows the table; exits non-zero when a result is missing."""
    options = _parser().parse_args(args)
    setup_logging()
    tasks = [name for name in dict.fromkeys(options.tasks.split(",")) if name]
    if not tasks or (options.limit is not None and options.limit < 1):
        raise SystemExit(f"need at least one task and question: got tasks {tasks}, limit {options.limit}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("eval.run is one process; for several, `accelerate launch -m lmms_eval` takes our model too")
    # Before the model: a misspelled name should not cost the time to load it.
    try:
        manager = task_manager(tasks, options.include_path)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    lm = VisionMoeLlava(
        options.model,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        quantization=options.quantization,
        max_new_tokens=options.max_new_tokens,
        blank_images=options.blank_images,
    )
    results, samples, failed = evaluate(
        lm,
        tasks,
        manager,
        data=options.data,
        limit=options.limit,
        post_prompt=options.post_prompt,
        seed=options.seed,
    )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    options.output.mkdir(parents=True, exist_ok=True)
    _write_samples(options.output / "samples.jsonl", samples)
    content = record("lmms_eval", options.model, settings, results)
    write_json(options.output / "results.json", {**content, "failed": failed})
    if results:
        sys.stdout.write(f"{tasks_table(results)}\n\nwritten: {options.output / 'results.json'}\n")
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise SystemExit(f"{len(failed)} of {len(tasks)} tasks gave no result:\n{reasons}")


if __name__ == "__main__":
    main()
