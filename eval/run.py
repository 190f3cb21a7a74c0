"""lmms-eval in process: `python -m eval.run --model DIR --suite paper|quick|scenes --output DIR`.

lmms-eval's own command ends with exit code 0 when a task failed. This one runs each task, writes what it got to
OUTPUT/results.json and OUTPUT/samples.jsonl, and exits non-zero when any result is missing. Started again after a crash
it asks nothing twice. Several models (--model given more than once), or the controls of --pictures, get a folder each
below OUTPUT, and a report that compares them (`eval.report`). Several processes: `torchrun --nproc_per_node N -m
eval.run ...` or `accelerate launch -m eval.run ...`.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from eval.asked import Asked, find_tasks
from eval.model_run import ModelRun
from eval.records import read_records
from eval.report import write_report
from eval.suites import Suite, read_suite
from eval.tables import tasks_table
from mllm.blind import Pictures
from mllm.lmms_adapter import VisionMoeLlava
from vision_moe.command_help import CommandParser
from vision_moe.distributed import is_main
from vision_moe.tracking import setup_logging


def model_folders(given: Sequence[str]) -> dict[str, str]:
    """Model folders by name, from "NAME=DIR" or "DIR", which is named by its last part that is not "model".

    Raises:
        ValueError: two of them have one name.
    """
    folders: dict[str, str] = {}
    for entry in given:
        name, separator, folder = entry.partition("=")
        if not separator:
            path = Path(entry).resolve()
            name, folder = path.parent.name if path.name == "model" else path.name, entry
        if name in folders or not name:
            raise ValueError(f"need a name of its own for every model, but {name!r} is not: give --model NAME={folder}")
        folders[name] = folder
    return folders


def kinds_of_pictures(given: str) -> list[Pictures]:
    """ "own,blank" -> ["own", "blank"].

    Raises:
        ValueError: one of them is unknown, or there is none.
    """
    kinds = list(dict.fromkeys(given.split(",")))
    if not set(kinds) <= set(get_args(Pictures)):
        raise ValueError(f"--pictures takes {', '.join(get_args(Pictures))} with commas between, but got {given!r}")
    return kinds


def _parser() -> CommandParser:
    parser = CommandParser(
        __doc__, ".venv/bin/python -m eval.run --model DIR --suite scenes --data outputs/scenes --output outputs/eval"
    )
    parser.add_argument(
        "--model", required=True, action="append", help="[NAME=]folder of a model or adapter that mllm.train wrote"
    )
    parser.add_argument("--suite", help="paper, quick, scenes, or a YAML file like those of eval/suites")
    parser.add_argument("--tasks", help="names with commas between, such as pope_scenes; with --suite: in its place")
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json and samples.jsonl")
    parser.add_argument("--data", type=Path, help="Scenes folder, for pope_scenes (default: $VISION_MOE_SCENES)")
    parser.add_argument("--limit", type=int, help="first so many questions of each task")
    parser.add_argument(
        "--pictures",
        default="own",
        help="own, blank, shuffled, or several with commas between: what is shown; the latter two are controls",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the answers that an earlier run with this output got from this model to these very questions",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, help="cap on what the tasks ask for")
    parser.add_argument("--post-prompt", help="replaces what the tasks append to each question")
    parser.add_argument("--include-path", type=Path, action="append", default=[], help="folder of more task YAML files")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", help="of the weights (float32, bfloat16); default: the checkpoint's")
    parser.add_argument("--quantization", choices=["4bit", "8bit"], help="hold the language model in fewer bits")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, and of the intervals")
    return parser


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what the suite says where a flag does not."""
    options = _parser().parse_args(args)
    if options.suite is None and options.tasks is None:
        raise ValueError("name the tasks: --suite paper, quick or scenes, or --tasks A,B")
    named = [name for name in dict.fromkeys((options.tasks or "").split(",")) if name]
    suite = Suite(tasks=named) if options.suite is None else read_suite(options.suite)
    options.tasks = named or suite.tasks
    options.limit = suite.limit if options.limit is None else options.limit
    options.max_new_tokens = suite.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    if not options.tasks or (options.limit is not None and options.limit < 1):
        raise ValueError(f"need at least one task and question: got tasks {options.tasks}, limit {options.limit}")
    options.model = model_folders(options.model)
    options.pictures = kinds_of_pictures(options.pictures)
    return options


def _asked(options: argparse.Namespace) -> Asked:
    # Before the models: a misspelled name should not cost the time to load them.
    manager = find_tasks(options.tasks, options.include_path)
    left_out = ("model", "pictures", "output", "resume", "device")
    settings: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in left_out}
    for key in ("data", "include_path"):
        settings[key] = _absolute(settings[key])
    return Asked(
        tasks=options.tasks,
        manager=manager,
        data=options.data,
        limit=options.limit,
        post_prompt=options.post_prompt,
        seed=options.seed,
        settings=settings,
    )


def _absolute(value: Path | list[Path] | None) -> Any:
    """Paths that a report finds from elsewhere."""
    if isinstance(value, list):
        return [str(path.resolve()) for path in value]
    return None if value is None else str(value.resolve())


def _run(options: argparse.Namespace, asked: Asked) -> tuple[list[Path], dict[str, str]]:
    """Every model on every kind of pictures: their folders, and reasons of failure."""
    failed: dict[str, str] = {}
    outputs: list[Path] = []
    for number, (name, folder) in enumerate(options.model.items()):
        if number:
            # The model before has gone, but for what refers to itself, and this one needs the room.
            gc.collect()
        base = options.output / name if len(options.model) > 1 else options.output
        lm = VisionMoeLlava(
            folder,
            device=options.device,
            dtype=options.dtype,
            batch_size=options.batch_size,
            quantization=options.quantization,
            max_new_tokens=options.max_new_tokens,
        )
        run = ModelRun(lm, name, folder, asked)
        for kind in options.pictures:
            outputs.append(base if kind == "own" else base / kind)
            reasons = run.run(kind, outputs[-1], resume=options.resume)
            failed |= {f"{name}, {kind} pictures, {task}": reason for task, reason in reasons.items()}
        del run, lm
    return outputs, failed


def main(args: Sequence[str] | None = None) -> None:
    """Evaluates, writes, shows the tables; exits non-zero when a result is missing."""
    setup_logging()
    try:
        options = _options(args)
        asked = _asked(options)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    outputs, failed = _run(options, asked)
    if is_main():
        _show(outputs, options.output)
    if failed:
        reasons = "\n".join(f"  {task}: {reason}" for task, reason in failed.items())
        raise SystemExit(f"{len(failed)} of {len(outputs) * len(asked.tasks)} tasks gave no result:\n{reasons}")


def _show(outputs: Sequence[Path], output: Path) -> None:
    records = read_records([folder / "results.json" for folder in outputs])
    for found in records:
        if found.result:
            sys.stdout.write(f"{found.name}\n\n{tasks_table(found.result)}\n\nwritten: {found.file}\n\n")
    if len([found for found in records if found.result]) > 1:
        sys.stdout.write(f"compared: {write_report(records, output)}\n")


if __name__ == "__main__":
    main()
