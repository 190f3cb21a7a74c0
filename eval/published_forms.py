"""Benchmarks in the files that their authors publish -> rows with the columns that lmms-eval's tasks read.

A row's "image" is the picture's name in the image folder.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from eval.caption_lists import read_json

Files = Mapping[str, Path]
Rows = list[dict[str, Any]]

_TEXT = Value("string")


@dataclass(frozen=True)
class Form:
    """One published form.

    Args:
        files: what each file is, by the name that `--files.NAME` takes.
        tasks: of lmms-eval or ours that read these columns.
        features: the columns.
        read: files -> rows.
        optional: names in `files` that may be left out.
    """

    files: dict[str, str]
    tasks: tuple[str, ...]
    features: Features
    read: Callable[[Files], Rows]
    optional: tuple[str, ...] = ()


def _pope(files: Files) -> Rows:
    rows = []
    for category, path in files.items():
        for line in _lines(path):
            answer = line["label"].strip().lower()
            if answer not in ("yes", "no"):
                raise ValueError(f'question {line["question_id"]} must have the label "yes" or "no", not {answer!r}')
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(line["question_id"]),
                    "question": line["text"],
                    "answer": answer,
                    "image_source": Path(line["image"]).stem,
                    "image": line["image"],
                    "category": category,
                }
            )
    return rows


def _mmvet(files: Files) -> Rows:
    return [
        {
            "question_id": name,
            "image": entry["imagename"],
            "question": entry["question"],
            "answer": entry["answer"],
            "image_source": entry.get("imagesource", ""),
            "capability": ",".join(entry["capability"]),
        }
        for name, entry in read_json(files["questions"]).items()
    ]


def _vqav2(files: Files) -> Rows:
    asked, known = read_json(files["questions"]), read_json(files["annotations"])
    answers = {entry["question_id"]: entry for entry in known["annotations"]}
    subset = asked["data_subtype"]
    rows = []
    for entry in asked["questions"]:
        if (answer := answers.get(entry["question_id"])) is None:
            raise ValueError(f"question {entry['question_id']} has no annotation in {files['annotations']}")
        rows.append(
            {
                "question_type": answer["question_type"],
                "multiple_choice_answer": answer["multiple_choice_answer"],
                "answers": answer["answers"],
                "image_id": entry["image_id"],
                "answer_type": answer["answer_type"],
                "question_id": entry["question_id"],
                "question": entry["question"],
                "image": f"COCO_{subset}_{entry['image_id']:012d}.jpg",
            }
        )
    return rows


def _textvqa(files: Files) -> Rows:
    words = {}
    if "ocr" in files:
        words = {entry["image_id"]: entry["ocr_tokens"] for entry in read_json(files["ocr"])["data"]}
    rows = []
    for entry in read_json(files["questions"])["data"]:
        if words and entry["image_id"] not in words:
            raise ValueError(f"picture {entry['image_id']} has no words in {files['ocr']}")
        rows.append(
            {
                "image_id": entry["image_id"],
                "question_id": entry["question_id"],
                "question": entry["question"],
                "image": f"{entry['image_id']}.jpg",
                "answers": entry["answers"],
                "ocr_tokens": words.get(entry["image_id"], []),
            }
        )
    return rows


def _vizwiz(files: Files) -> Rows:
    return [
        {
            "question_id": Path(entry["image"]).stem,
            "image": entry["image"],
            "question": entry["question"],
            "answers": [answer["answer"] for answer in entry["answers"]],
            "category": entry.get("answer_type", ""),
        }
        for entry in read_json(files["questions"])
    ]


def _gqa(files: Files) -> Rows:
    return [
        {
            "id": name,
            "imageId": entry["imageId"],
            "question": entry["question"],
            "answer": entry["answer"],
            "fullAnswer": entry.get("fullAnswer", ""),
            "image": f"{entry['imageId']}.jpg",
        }
        for name, entry in read_json(files["questions"]).items()
    ]


def _llava_bench(files: Files) -> Rows:
    captions = {entry["image"]: entry["caption"] for entry in _lines(files["context"])}
    answers = {entry["question_id"]: entry["text"] for entry in _lines(files["answers"])}
    return [
        {
            "question_id": entry["question_id"],
            "question": entry["text"],
            "gpt_answer": answers[entry["question_id"]],
            "category": entry["category"],
            "image_id": entry["image"],
            "caption": captions[entry["image"]],
            "image": entry["image"],
        }
        for entry in _lines(files["questions"])
    ]


def _lines(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def _features(*texts: str, **others: Any) -> Features:
    return Features({**dict.fromkeys(texts, _TEXT), "image": Image(), **others})


FORMS = {
    "pope": Form(
        {name: f"coco_pope_{name}.json" for name in ("random", "popular", "adversarial")},
        ("pope", "pope_llava"),
        _features("id", "question_id", "question", "answer", "image_source", "category"),
        _pope,
    ),
    "mmvet": Form(
        {"questions": "mm-vet.json"},
        ("mmvet_judge", "mmvet_llava"),
        _features("question_id", "question", "answer", "image_source", "capability"),
        _mmvet,
    ),
    "vqav2": Form(
        {
            "questions": "v2_OpenEnded_mscoco_val2014_questions.json",
            "annotations": "v2_mscoco_val2014_annotations.json",
        },
        ("vqav2_val",),
        _features(
            "question_type",
            "multiple_choice_answer",
            "answer_type",
            "question",
            image_id=Value("int64"),
            question_id=Value("int64"),
            answers=List({"answer": _TEXT, "answer_confidence": _TEXT, "answer_id": Value("int64")}),
        ),
        _vqav2,
    ),
    "textvqa": Form(
        {"questions": "TextVQA_0.5.1_val.json", "ocr": "TextVQA_Rosetta_OCR_v0.2_val.json"},
        ("textvqa_val", "textvqa_val_ocr"),
        _features("image_id", "question", question_id=Value("int64"), answers=List(_TEXT), ocr_tokens=List(_TEXT)),
        _textvqa,
        optional=("ocr",),
    ),
    "vizwiz": Form(
        {"questions": "val.json"},
        ("vizwiz_vqa_val",),
        _features("question_id", "question", "category", answers=List(_TEXT)),
        _vizwiz,
    ),
    "gqa": Form(
        {"questions": "testdev_balanced_questions.json"},
        ("gqa",),
        _features("id", "imageId", "question", "answer", "fullAnswer"),
        _gqa,
    ),
    "llava_bench": Form(
        {"questions": "questions.jsonl", "context": "context.jsonl", "answers": "answers_gpt4.jsonl"},
        ("llava_in_the_wild_judge",),
        _features("question", "gpt_answer", "category", "image_id", "caption", question_id=Value("int64")),
        _llava_bench,
    ),
}
