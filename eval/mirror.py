"""Local mirrors of lmms-eval's tasks: `python -m eval.mirror --output mirrors ...`, then
`python -m eval.run --tasks pope_local --include-path mirrors ...`; no network.

From a benchmark's own files:   --form pope --files.random coco_pope_random.json ... --images val2014
From a copy of its Hub data:    --tasks '[mme]' --data MME   (parquet or arrow files, or what `save_to_disk` wrote)

A mirror is one YAML file that includes the task's own and names other data, so prompts and scores are the task's.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import yaml
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from tenacity import RetryError

from eval.mirror_data import find_data, join_gqa, write_rows
from eval.published_forms import FORMS
from vision_moe.config import parse
from vision_moe.files import write_text
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

TASKS = Path(__file__).resolve().parent / "tasks"
BUILT_IN = Path(lmms_eval.tasks.__file__).parent
# Folders in it that hold the tasks of the paper's suite: to index all its YAML files takes many seconds.
_USUAL = (
    "gqa",
    "llava-in-the-wild",
    "mmbench",
    "mme",
    "mmstar",
    "mmvet",
    "ocrbench",
    "pope",
    "scienceqa",
    "seedbench",
    "textvqa",
    "vizwiz_vqa",
    "vqav2",
)


@dataclass(frozen=True, kw_only=True)
class MirrorConfig:
    """What is mirrored, and from where.

    Example:
        .venv/bin/python -m eval.mirror --data MME --tasks '[mme]' --output outputs/mirrors
    """

    output: Path
    """Folder for the YAML files, and the data that a form's files become."""
    form: str | None = None
    """Form of the benchmark's own files: pope, mmvet, vqav2, textvqa, vizwiz, gqa or llava_bench."""
    files: dict[str, Path] = field(default_factory=dict)
    """The form's files by name, such as --files.questions mm-vet.json; a missing one is named."""
    images: Path | None = None
    """Folder that the form's picture names are relative to."""
    embed: bool = False
    """Copy the pictures into the mirror instead of naming their files; asked once for each question."""
    data: Path | None = None
    """Data in the columns that the tasks read: a parquet or arrow file, a folder of them, or one of `save_to_disk`."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lmms-eval or ours that read it; default: those of the form."""
    suffix: str = "_local"
    """Added to the tasks' names. With '' a mirror takes the place of the task in eval.run, so that suites and reports
    find it; the plain lmms-eval command takes its own task where two have one name."""

    def __post_init__(self) -> None:
        if (self.form is None) == (self.data is None):
            raise ValueError("give either --form, with --files and --images, or --data, with --tasks")
        if self.data is not None and (not self.tasks or self.files or self.images):
            raise ValueError("--data goes with --tasks, and with neither --files nor --images")
        if self.form is not None:
            self._check_form()

    def _check_form(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}; choose one of: {', '.join(FORMS)}")
        form = FORMS[self.form]
        missing = [name for name in form.files if name not in self.files and name not in form.optional]
        if missing or self.images is None or set(self.files) - set(form.files):
            wanted = [f"--files.{name} {file}" for name, file in form.files.items()]
            raise ValueError(f"the form {self.form} takes {' '.join(wanted)} --images FOLDER, got {list(self.files)}")


def mirror(config: MirrorConfig) -> list[Path]:
    """Writes the mirrors and reads the first question of each.

    Returns:
        Their YAML files.

    Raises:
        FileNotFoundError: a file or a picture is not there.
        ValueError: a file has another form, a task is not known or does not read this data.
    """
    originals = _originals(config.tasks or _default_tasks(config))
    data = config.data
    if config.form is not None and config.images is not None:
        data = config.output / config.form / "questions.parquet"
        form = FORMS[config.form]
        try:
            rows = form.read({name: config.files[name] for name in form.files if name in config.files})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{[str(file) for file in config.files.values()]} are no {config.form}: {error!r}"
            ) from error
        count = write_rows(rows, form.features, config.images, data, embed=config.embed)
        logger.info("%d questions in %s", count, data)
    return [_mirror_task(name, original, Path(data or ""), config) for name, original in originals.items()]


def _default_tasks(config: MirrorConfig) -> list[str]:
    # Without the words of an OCR system this task has nothing to show the model.
    left_out = set() if "ocr" in config.files else {"textvqa_val_ocr"}
    return [name for name in FORMS[str(config.form)].tasks if name not in left_out]


def _originals(tasks: Sequence[str]) -> dict[str, Path]:
    """The YAML file of each task."""
    for folders in ([TASKS, *(BUILT_IN / name for name in _USUAL)], [TASKS, BUILT_IN]):
        index = TaskManager("WARNING", include_path=[str(path) for path in folders], include_defaults=False).task_index
        known = {name: entry for name, entry in index.items() if entry["type"] in ("task", "python_task")}
        unknown = [name for name in tasks if name not in known]
        if not unknown:
            return {name: Path(known[name]["yaml_path"]).resolve() for name in tasks}
    raise ValueError(
        f"no tasks {', '.join(unknown)}; `lmms-eval tasks list` names them (a group is none, its parts are)"
    )


def _mirror_task(name: str, original: Path, data: Path, config: MirrorConfig) -> Path:
    content = load_yaml_config(original, mode="simple")
    split = content.get("test_split") or content["validation_split"]
    changes: dict[str, Any] = {}
    if name == "gqa":
        # Its own process_docs fetches the pictures from the Hub.
        changes["process_docs"] = None
        if config.form is None:
            data = join_gqa(data, config.output / "gqa")
    source = find_data(data.resolve(), split, content.get("dataset_name"))
    local = name + config.suffix
    file = config.output / f"{local}.yaml"
    body = {"include": str(original), "task": local, "dataset_name": None, **source, **changes}
    head = f"# {name} on local data; written by eval.mirror. lmms-eval's own YAML file is included by its path.\n"
    write_text(file, head + yaml.safe_dump(body, sort_keys=False))
    try:
        _show_first(local, file)
    except BaseException:
        file.unlink()
        raise
    return file


def _show_first(name: str, file: Path) -> None:
    """Loads the task as lmms-eval does, and makes its first question."""
    try:
        manager = TaskManager("WARNING", include_path=str(file.parent), include_defaults=False)
        task = manager.load_task_or_group(name)[name]
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        text, pictures = task.doc_to_text(docs[0]), task.doc_to_visual(docs[0])
    except Exception as error:
        # lmms-eval tries everything five times, and tenacity hides why.
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise ValueError(f"{name} does not read this data: {type(cause).__name__}: {cause}") from error
    sys.stdout.write(f"{file}: {len(docs)} questions; the first, with {len(pictures)} pictures:\n{text}\n\n")


def main(args: Sequence[str] | None = None) -> None:
    """Writes mirrors; shows the first question of each."""
    setup_logging()
    config = parse(MirrorConfig, args)
    try:
        files = mirror(config)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    names = ",".join(file.stem for file in files)
    sys.stdout.write(f"run with: python -m eval.run --tasks {names} --include-path {config.output} ...\n")


if __name__ == "__main__":
    main()
