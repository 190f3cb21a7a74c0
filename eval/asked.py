"""What the models of a run are asked: tasks, and what the command changes in their YAML files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager

from eval.tasks.pope_scenes.scenes import source
from mllm.lmms_tasks import task_manager

TASKS = Path(__file__).resolve().parent / "tasks"


def find_tasks(names: Sequence[str], include_paths: Sequence[Path]) -> TaskManager:
    """Those of these folders, our own and lmms-eval's: the first of a name; see `mllm.lmms_tasks.task_manager`."""
    return task_manager(names, [*include_paths, TASKS])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every model is asked.

    Attributes:
        tasks: names of tasks or groups that `manager` knows.
        manager: of `mllm.lmms_tasks.task_manager`.
        data: Scenes folder, for pope_scenes; None = the environment variable VISION_MOE_SCENES.
        limit: the first so many questions of each task; None = all.
        post_prompt: replaces what the tasks append to each question.
        seed: of everything that is drawn: lmms-eval's, the shuffled pictures, the intervals.
        settings: all of the command, for the record.
    """

    tasks: Sequence[str]
    manager: TaskManager
    data: Path | None
    limit: int | None
    post_prompt: str | None
    seed: int
    settings: dict[str, Any]

    def task(self, name: str) -> str | dict[str, Any]:
        """A task's name, with what the command changes in its YAML.

        Raises:
            FileNotFoundError: the Scenes folder has no questions.
        """
        changes: dict[str, Any] = {}
        if self.data is not None and name == "pope_scenes":
            if not (self.data / "pope_test.jsonl").is_file():
                raise FileNotFoundError(
                    f"no pope_test.jsonl in {self.data}; `python -m vision_moe.data.scenes` writes it"
                )
            changes |= source(self.data)
        if self.post_prompt is not None:
            changes["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": self.post_prompt}}
        return {"task": name, **changes} if changes else name
