"""The pictures of questions that a run was asked, from its tasks' data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.tasks import get_task_dict
from PIL import Image

from eval.asked import Asked, find_tasks
from eval.records import Found


class TaskPictures:
    """Opens the tasks of a run as the run did.

    Args:
        record: of eval.run.
    """

    def __init__(self, record: Found) -> None:
        self._settings = record.settings
        self._tasks: dict[str, Any] = {}

    def of(self, line: dict[str, Any]) -> Sequence[Image.Image]:
        """The pictures of a line of samples.jsonl.

        Raises:
            ValueError: the task's data are others than when the model was asked.
            Exception: they are not there any more, as whatever loads them says it.
        """
        name = line["task"]
        if name not in self._tasks:
            try:
                self._tasks[name] = self._open(name)
            except Exception as error:
                # lmms-eval may have tried for minutes: not again for the next question.
                self._tasks[name] = error
        task = self._tasks[name]
        if isinstance(task, Exception):
            raise task
        doc = task.eval_docs[line["doc_id"]]
        told = {key: value for key, value in doc.items() if isinstance(value, str | int | float)}
        if any(value != line["doc"].get(key) for key, value in told.items()):
            raise ValueError(
                f"question {line['doc_id']} of {line['task']} is another one than when the model was asked"
            )
        return [image.convert("RGB") for image in task.doc_to_visual(doc) or []]

    def _open(self, name: str) -> Any:
        settings = self._settings
        manager = find_tasks([name], [Path(path) for path in settings["include_path"]])
        asked = Asked(
            tasks=[name],
            manager=manager,
            data=None if settings["data"] is None else Path(settings["data"]),
            limit=None,
            post_prompt=None,
            seed=0,
            settings={},
        )
        return get_task_dict([asked.task(name)], manager, "simple")[name]
