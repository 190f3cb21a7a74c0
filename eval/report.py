"""Records of measurements, compared: `python -m eval.report FILE_OR_FOLDER ... [--output DIR]`.

Markdown to the console, or with --output report.md and report.html: measured numbers in the columns of CLIP-MoE's
tables beside its own, what differs in protocol, the difference of every two models drawn picture by picture, and
questions on which they disagree, with the pictures.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from PIL import Image

from eval.pairs import Disagreement, differences_table, different_settings, disagreements, encoder_comparisons, pairs
from eval.paper_tables import multimodal_table, retrieval_tables, zero_shot_table
from eval.records import Found, of_benchmark, read_records
from eval.tables import factors_table, imagenet_o_table, table, tasks_table, yes_no_table
from mllm.blind import pixels_sha256
from vision_moe.command_help import CommandParser
from vision_moe.files import replacing, write_text

if TYPE_CHECKING:
    from eval.task_pictures import TaskPictures

_PICTURE_SIDE = 320
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1em 0 }}
th, td {{ border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top }}
th {{ background: #f3f3f3 }}
</style></head><body>
{body}</body></html>
"""


def markdown(records: Sequence[Found], *, seed: int, pictures: Path | None = None, number: int = 0) -> str:
    """The report.

    Args:
        records: of any commands of eval.
        seed: of the bootstrap, and of the questions that are shown.
        pictures: folder for the pictures of questions; None shows no questions.
        number: how many questions of each task and pair.
    """
    return "\n\n".join(text for text in _parts(records, seed, pictures, number) if text) + "\n"


def write_report(records: Sequence[Found], output: Path, *, seed: int = 0, number: int = 8) -> Path:
    """Writes report.md, report.html and report_pictures/; returns the HTML's path."""
    text = markdown(records, seed=seed, pictures=output / "report_pictures", number=number)
    write_text(output / "report.md", text)
    page = _PAGE.format(body=MarkdownIt("commonmark", {"html": False}).enable("table").render(text))
    write_text(output / "report.html", page)
    return output / "report.html"


def _parts(records: Sequence[Found], seed: int, pictures: Path | None, number: int) -> Iterator[str]:
    yield "# Evaluation"
    yield _models(records)
    for title, text in (
        ("LLaVA-1.5 benchmarks", multimodal_table(records)),
        ("Retrieval", retrieval_tables(records)),
        ("Zero-shot classification", zero_shot_table(records)),
    ):
        yield f"## {title}\n\n{text}" if text else ""
    for benchmark, title, show in (
        ("lmms_eval", "Tasks", tasks_table),
        ("yes_no", "Yes or no", yes_no_table),
        ("factors", "Factors", factors_table),
        ("imagenet_o", "ImageNet-O", imagenet_o_table),
    ):
        for record in of_benchmark(records, benchmark):
            yield f"## {title}: {record.name}\n\n{show(record.result)}\n\n{_failed(record)}".rstrip()
    for title, text in encoder_comparisons(records, seed=seed):
        yield f"## Difference, {title}\n\n{text}"
    for a, b in pairs(records):
        yield from _pair(a, b, seed, pictures, number)


def _models(records: Sequence[Found]) -> str:
    rows = []
    for record in records:
        model = record.content["model"]
        packages = record.content["environment"]["packages"]
        kind = [str(model[key]) for key in ("tower", "image_size", "llm", "dtype") if key in model]
        rows.append(
            [
                record.name,
                record.benchmark,
                ", ".join(kind),
                (model["weights_sha256"] or "")[:12],
                record.content["time"],
                f"{record.content['environment']['commit']}, lmms-eval {packages['lmms-eval']}",
                str(record.file),
            ]
        )
    return table(["model", "measured by", "tower, pixels, LLM, type", "weights", "time", "code", "record"], rows)


def _failed(record: Found) -> str:
    failed = record.content.get("failed", {})
    return "\n".join(f"- no result: {name}: {escaped(reason)}" for name, reason in failed.items())


def _pair(a: Found, b: Found, seed: int, pictures: Path | None, number: int) -> Iterator[str]:
    text = differences_table(a, b, seed=seed)
    if not text:
        return
    yield f"## Difference: A = {a.name}, B = {b.name}"
    yield text
    differing = [name for name in different_settings(a, b) if name != "pictures"]
    if differing:
        yield f"The runs differ in {', '.join(differing)} as well."
    if pictures is None or a.pictures != b.pictures:
        return
    # lmms-eval, which only this needs, takes seconds to import.
    from eval.task_pictures import TaskPictures

    shown = TaskPictures(a)
    for task in a.result.keys() & b.result.keys():
        found = disagreements(a, b, task, number=number, seed=seed)
        if found:
            yield f"### Where they disagree: {task}"
            header = ["picture", "question", "truth", f"A: {a.name}", f"B: {b.name}", "better"]
            yield table(header, [_question(pair, shown, pictures) for pair in found])


def _question(pair: Disagreement, shown: "TaskPictures", folder: Path) -> list[str]:
    try:
        images = shown.of(pair.a)
    except Exception as error:  # whatever a task's data raise that are not here any more: the report says so
        cell = escaped(f"no picture: {error}")
    else:
        cell = " ".join(f"![]({folder.name}/{_saved(image, folder)})" for image in images)
    texts = [escaped(str(text)) for text in (pair.a["prompt"], pair.a["target"], pair.a["answer"], pair.b["answer"])]
    return [cell, *texts, "A" if pair.score_a > pair.score_b else "B"]


def _saved(image: Image.Image, folder: Path) -> str:
    name = f"{pixels_sha256(image)[:16]}.jpg"
    small = image.copy()
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    with replacing(folder / name) as temporary:
        small.save(temporary, "JPEG", quality=85)
    return name


def escaped(text: str, length: int = 400) -> str:
    """Text that stands in a cell of a Markdown table as it is, cut where it is long."""
    line = " ".join(text.split())
    line = line if len(line) <= length else line[:length] + " ..."
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", line)


def main(args: Sequence[str] | None = None) -> None:
    """Shows or writes the report of the records named, or found in the folders named."""
    parser = CommandParser(__doc__, ".venv/bin/python -m eval.report outputs/records --output outputs/compared")
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders searched for *.json")
    parser.add_argument("--output", type=Path, help="folder for report.md, report.html and report_pictures/")
    parser.add_argument("--questions", type=int, default=8, help="shown of each task and pair, with --output")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of the questions shown")
    options = parser.parse_args(args)
    try:
        records = read_records(options.records)
        if options.output is None:
            sys.stdout.write(markdown(records, seed=options.seed))
            return
        page = write_report(records, options.output, seed=options.seed, number=options.questions)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(f"written: {page}\n")


if __name__ == "__main__":
    main()
