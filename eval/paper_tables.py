"""Measured numbers in the columns of CLIP-MoE's tables, beside its rows; what differs in protocol is marked.

`published.yaml` holds the paper's numbers and what is known of how they were measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from eval.records import Found, of_benchmark
from eval.tables import number, percent, table

_FILE = Path(__file__).resolve().parent / "published.yaml"
_WAYS = ("image_to_text", "text_to_image")


def published() -> dict[str, Any]:
    """The content of published.yaml."""
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


class Notes:
    """Footnotes: equal ones share a letter."""

    def __init__(self) -> None:
        self._notes: list[str] = []

    def marks(self, notes: Sequence[str]) -> str:
        """ " (a, c)", or nothing."""
        self._notes += [note for note in notes if note not in self._notes]
        letters = sorted(_letters(self._notes.index(note)) for note in notes)
        return f" ({', '.join(letters)})" if letters else ""

    def text(self) -> str:
        """One line for each."""
        return "\n".join(f"- ({_letters(index)}) {note}" for index, note in enumerate(self._notes))


def multimodal_table(records: Sequence[Found]) -> str:
    """The paper's table of LLaVA-1.5 with a row for each record of eval.run; "" if none has a task of it."""
    paper = published()
    part = paper["multimodal"]
    mine = of_benchmark(records, "lmms_eval")
    shown = {
        name: column
        for name, column in part["columns"].items()
        if name in part["rows"][0] or any(_task(record, column) for record in mine)
    }
    if not any(_task(record, column) for column in shown.values() for record in mine):
        return ""
    notes = Notes()
    rows = [[f"{row['name']} (paper)", *(_plain(row.get(name)) for name in shown)] for row in part["rows"]]
    for record in mine:
        cells = [_cell(record, column, part, notes) for column in shown.values()]
        rows.append([record.name + notes.marks(_of_model(record, part)), *cells])
    head = f"Paper: {paper['source']}, {part['table']} 95 % intervals in brackets."
    return f"{head}\n\n{table(['model', *shown], rows)}\n\n{notes.text()}"


def retrieval_tables(records: Sequence[Found]) -> str:
    """A table for each protocol of retrieval, with the paper's rows where they are of that protocol."""
    paper = published()
    mine = of_benchmark(records, "retrieval")
    texts = []
    for protocol in dict.fromkeys(record.settings.get("protocol") for record in mine):
        rows = [
            [f"{row['name']} (paper)", *map(_plain, row[protocol]), ""]
            for row in paper["retrieval"]["rows"]
            if protocol in row
        ]
        for record in mine:
            if record.settings.get("protocol") == protocol:
                of = record.result
                cells = [percent(of[way][k], of[f"{way}_interval"][k]) for way in _WAYS for k in ("R@1", "R@5", "R@10")]
                rows.append([record.name, *cells, f"{of['num_images']} / {of['num_captions']}"])
        header = ["model", "I2T R@1", "R@5", "R@10", "T2I R@1", "R@5", "R@10", "pictures / captions"]
        texts.append(f"### {protocol or 'no protocol'}\n\n{table(header, rows)}")
    return "\n\n".join(texts)


def zero_shot_table(records: Sequence[Found]) -> str:
    """Top-1 by data set, with the paper's rows; "" without a record."""
    mine = of_benchmark(records, "zero_shot")
    if not mine:
        return ""
    paper_rows = published()["zero_shot"]["rows"]
    sets = list(dict.fromkeys(record.settings["dataset"] for record in mine))
    rows = [
        [f"{row['name']} (paper)", *(_plain(row.get(name)) for name in sets)]
        for row in paper_rows
        if any(name in row for name in sets)
    ]
    for model in dict.fromkeys(record.name for record in mine):
        cells = dict.fromkeys(sets, "")
        for record in mine:
            if record.name == model:
                found = record.result["accuracy"]["top-1"]
                cells[record.settings["dataset"]] = f"{percent(found['value'], found['interval'])}, n = {found['n']}"
        rows.append([model, *cells.values()])
    return table(["model", *sets], rows)


def _cell(record: Found, column: dict[str, Any], part: dict[str, Any], notes: Notes) -> str:
    task = _task(record, column)
    if task is None:
        return ""
    entry = record.result[task]
    value, interval = entry["metrics"][column["metric"]], entry["intervals"].get(column["metric"])
    return number(value, interval, scale=column["scale"]) + notes.marks(_differences(record, column, entry))


def _task(record: Found, column: dict[str, Any]) -> str | None:
    """The first task of a record that measures a column."""
    names = [name for task in column["tasks"] for name in (task, f"{task}_local")]
    return next(
        (name for name in names if column["metric"] in record.result.get(name, {"metrics": ()})["metrics"]), None
    )


def _differences(record: Found, column: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """In what a number was measured otherwise than the paper's, or may have been."""
    notes = [column["note"]] if "note" in column else []
    if column.get("questions", entry["n"]) != entry["n"]:
        notes.append(f"{entry['n']} of {column['questions']} questions")
    if column.get("judged"):
        judge = entry["judge"] or {}
        model = judge.get("model") or judge.get("MODEL_VERSION") or "lmms-eval's default model"
        notes.append(f"judged by {model}; the paper does not name its judge")
    if record.settings["post_prompt"] is not None:
        notes.append(f"the prompt ends with {record.settings['post_prompt']!r}")
    if record.settings["max_new_tokens"] is not None:
        notes.append(f"answers of at most {record.settings['max_new_tokens']} tokens")
    return notes


def _of_model(record: Found, part: dict[str, Any]) -> list[str]:
    model, notes = record.content["model"], []
    if record.pictures != "own":
        notes.append(f"control: {record.pictures} pictures")
    if model.get("image_size") != part["image_size"]:
        notes.append(f"pictures of {model.get('image_size')} pixels, {part['image_size']} in the paper")
    if record.settings["quantization"] is not None:
        notes.append(f"language model in {record.settings['quantization']}")
    return notes


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _letters(index: int) -> str:
    """0 -> "a", 25 -> "z", 26 -> "aa"."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)
