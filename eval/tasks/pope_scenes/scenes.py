"""Questions of Scenes in the columns of lmms-eval's POPE task. lmms-eval loads this file by its path."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import datasets

_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question_id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "image_source": datasets.Value("string"),
        "image": datasets.Image(),
        "category": datasets.Value("string"),
    }
)


def source(folder: Path) -> dict[str, Any]:
    """The part of the task that depends on where Scenes lies.

    Args:
        folder: a Scenes folder, with `pope_test.jsonl` and `images/`.

    Returns:
        "dataset_kwargs" and "process_docs" of the task.
    """
    questions = folder.resolve() / "pope_test.jsonl"
    return {
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "process_docs": partial(_columns, folder.resolve() / "images"),
    }


def _columns(images: Path, questions: datasets.Dataset) -> datasets.Dataset:
    rows = [
        {
            "id": str(row["question_id"]),
            "question_id": str(row["question_id"]),
            "question": row["text"],
            "answer": row["label"],
            "image_source": row["image"],
            "image": str(images / row["image"]),
            "category": row["category"],
        }
        for row in questions
    ]
    return datasets.Dataset.from_list(rows, features=_COLUMNS)


# What the YAML names. lmms-eval tells neither of them where the data lies, so the environment does.
_SOURCE = source(Path(os.environ.get("VISION_MOE_SCENES", "outputs/scenes")))
DATASET_KWARGS = _SOURCE["dataset_kwargs"]
pope_columns = _SOURCE["process_docs"]
