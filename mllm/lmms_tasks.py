"""lmms-eval's tasks in process, one at a time: found by name, run, and their numbers told from what is none."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from mllm.lmms_adapter import VisionMoeLlava


def task_manager(tasks: Sequence[str], include_paths: Sequence[Path]) -> TaskManager:
    """The index of the YAML files in `include_paths`, and of lmms-eval's own where one of them is asked for.

    Raises:
        ValueError: a name is no task.
        FileNotFoundError: a folder is not there.
    """
    for path in include_paths:
        if not path.is_dir():
            raise FileNotFoundError(f"no folder of task YAML files at {path}")
    folders = [str(path) for path in include_paths]
    ours = TaskManager("WARNING", include_path=folders, include_defaults=False)
    if set(tasks) <= set(ours.all_tasks):
        return ours
    # Indexing lmms-eval's own two thousand YAML files takes a while. Of two tasks of one name the first that is indexed
    # counts, so that a mirror can stand in for lmms-eval's own.
    built_in = str(Path(lmms_eval.tasks.__file__).parent)
    everything = TaskManager("WARNING", include_path=[*folders, built_in], include_defaults=False)
    unknown = sorted(set(tasks) - set(everything.all_tasks))
    if unknown:
        raise ValueError(
            f"unknown tasks {', '.join(unknown)}; ours are {', '.join(ours.all_tasks) or 'none'}, and "
            "`lmms-eval tasks list` names the others"
        )
    return everything


def run_task(
    lm: VisionMoeLlava,
    task: str | dict[str, Any],
    manager: TaskManager,
    *,
    limit: int | None = None,
    seed: int | None = None,
) -> dict[str, Any] | None:
    """Runs a task or a group; all ranks must call it.

    Args:
        lm: the model.
        task: its name, or {"task": name, and what to change in its YAML}.
        manager: of `task_manager`.
        limit: the first so many questions; None = all.
        seed: of everything that lmms-eval draws; None leaves the generators as they are.

    Returns:
        What lmms-eval's `simple_evaluate` returns, samples included; None on other ranks than the first.
    """
    found: dict[str, Any] | None = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed or 0,
    )
    return found


def numbers(task: str, found: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The metrics of a task by name, and the names of those that have no number.

    Raises:
        ValueError: there is no number, or one that is not finite.
    """
    metrics: dict[str, float] = {}
    others: list[str] = []
    for key, value in found["results"].get(task, {}).items():
        metric = key.partition(",")[0]
        if metric in ("alias", "samples") or "stderr" in metric or metric.endswith("_clt"):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics[metric] = float(value)
        else:
            others.append(metric)
    if not metrics:
        raise ValueError(f"task {task} has no numeric result; without a number: {', '.join(others) or 'nothing'}")
    if not all(math.isfinite(value) for value in metrics.values()):
        raise ValueError(f"task {task} has a result that is not finite: {metrics}")
    return metrics, others
