"""eval.mirror: benchmarks in their own files, and copies of their Hub data, become tasks that lmms-eval reads."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from lmms_eval.tasks import TaskManager
from PIL import Image

from eval.mirror import MirrorConfig, main, mirror
from eval.mirror_data import find_data
from eval.published_forms import FORMS
from vision_moe.config import parse


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """pictures(*names) -> folder that holds them, each of another red."""

    def make(*names: str) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for index, name in enumerate(names):
            Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(folder / name)
        return folder

    return make


def load(file: Path):
    """The task of a mirror, and its first question: the task, the row, the prompt, the pictures."""
    manager = TaskManager("WARNING", include_path=str(file.parent), include_defaults=False)
    task = manager.load_task_or_group(file.stem)[file.stem]
    doc = task.test_docs()[0]
    return task, doc, task.doc_to_text(doc), task.doc_to_visual(doc)


def write(path: Path, content: object) -> Path:
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content))
    return path


def test_pope_from_its_three_files_and_an_image_folder(shared_data, pictures, tmp_path, capsys):
    files = {name: shared_data / "pope" / file for name, file in FORMS["pope"].files.items()}
    lines = [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]
    images = pictures(*dict.fromkeys(line["image"] for line in lines))
    flags = [flag for name, file in files.items() for flag in (f"--files.{name}", str(file))]
    output = tmp_path / "mirrors"
    main(["--form", "pope", *flags, "--images", str(images), "--output", str(output)])
    assert "--tasks pope_local,pope_llava_local" in capsys.readouterr().out
    task, doc, prompt, (picture,) = load(output / "pope_local.yaml")
    assert len(task.test_docs()) == 9000
    assert prompt == f"{lines[0]['text']}\nAnswer the question using a single word or phrase."
    assert (doc["answer"], doc["category"]) == (lines[0]["label"], "random")
    assert picture.size == (8, 8)
    table = pq.read_table(output / "pope" / "questions.parquet", columns=["category", "answer"]).to_pydict()
    assert {name: table["category"].count(name) for name in files} == dict.fromkeys(files, 3000)
    assert table["answer"].count("yes") == 4500


def test_mmvet_from_its_json(pictures, tmp_path):
    entry = {"imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    questions = write(tmp_path / "mm-vet.json", {"v1_0": entry})
    config = MirrorConfig(
        form="mmvet",
        files={"questions": questions},
        images=pictures("v1_0.png"),
        output=tmp_path / "mirrors",
        embed=True,
    )
    judged, raw = mirror(config)
    (tmp_path / "pictures" / "v1_0.png").unlink()
    _, doc, prompt, (picture,) = load(raw)
    assert (prompt, doc["capability"], picture.size) == ("x?", "ocr,math", (8, 8))
    assert load(judged)[2].endswith("following question: \n\nx?")


def test_vqa_forms(pictures, tmp_path):
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": index} for index in range(10)]
    asked = {"question_id": 5, "image_id": 42, "question": "What color?"}
    known = {"question_id": 5, "question_type": "what", "multiple_choice_answer": "red", "answer_type": "other"}
    vqav2 = {
        "questions": write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [asked]}),
        "annotations": write(tmp_path / "a.json", {"annotations": [{**known, "answers": answers}]}),
    }
    textvqa_entry = {"image_id": "ab", "question_id": 7, "question": "What does iPhone say?", "answers": ["hi"] * 10}
    textvqa = {
        "questions": write(tmp_path / "t.json", {"data": [textvqa_entry]}),
        "ocr": write(tmp_path / "ocr.json", {"data": [{"image_id": "ab", "ocr_tokens": ["HI", "you"]}]}),
    }
    vizwiz_entry = {"image": "VizWiz_val_0.jpg", "question": "What is it?", "answers": [{"answer": "a can"}] * 10}
    vizwiz = {"questions": write(tmp_path / "v.json", [vizwiz_entry])}
    gqa = {"questions": write(tmp_path / "g.json", {"201": {"imageId": "n1", "question": "Who?", "answer": "man"}})}
    images = pictures("COCO_val2014_000000000042.jpg", "ab.jpg", "VizWiz_val_0.jpg", "n1.jpg")

    def made(form: str, files: dict[str, Path]) -> dict[str, Path]:
        config = MirrorConfig(form=form, files=files, images=images, output=tmp_path / "mirrors")
        return {file.stem: file for file in mirror(config)}

    task, doc, prompt, (picture,) = load(made("vqav2", vqav2)["vqav2_val_local"])
    assert prompt == "What color?\nAnswer the question using a single word or phrase."
    assert task.process_results(doc, ["red"]) == {"exact_match": 1}
    assert picture.getpixel((0, 0))[0] < 5
    files = made("textvqa", textvqa)
    assert load(files["textvqa_val_local"])[2].startswith("What does iphone say?\nAnswer")
    expected = "What does iPhone say?\nReference OCR token: HI, you\nAnswer the question using a single word or phrase."
    assert load(files["textvqa_val_ocr_local"])[2] == expected
    assert list(made("textvqa", {"questions": textvqa["questions"]})) == ["textvqa_val_local"]
    task, doc, prompt, _ = load(made("vizwiz", vizwiz)["vizwiz_vqa_val_local"])
    assert "respond with 'Unanswerable'" in prompt
    assert task.process_results(doc, ["A can."])["exact_match"] == 1
    assert load(made("gqa", gqa)["gqa_local"])[2].startswith("Who?\n")


def test_llava_bench_from_its_files(pictures, tmp_path):
    files = {
        "questions": [{"question_id": 0, "image": "001.jpg", "text": "Where?", "category": "conv"}],
        "context": [{"id": "001", "image": "001.jpg", "caption": "A hill."}],
        "answers": [{"question_id": 0, "text": "There."}],
    }
    paths = {name: write(tmp_path / f"{name}.jsonl", lines) for name, lines in files.items()}
    config = MirrorConfig(form="llava_bench", files=paths, images=pictures("001.jpg"), output=tmp_path / "mirrors")
    _, doc, prompt, _ = load(mirror(config)[0])
    assert (prompt, doc["gpt_answer"], doc["caption"]) == ("Where?", "There.", "A hill.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"takes --files.questions mm-vet.json --images FOLDER, got \['questions'\]"),
        ({"files": {}}, r"takes --files.questions mm-vet.json --images FOLDER, got \[\]"),
        ({"form": "moon"}, "unknown form 'moon'; choose one of: pope, mmvet"),
        ({"form": None}, "either --form, with --files and --images, or --data"),
        ({"form": None, "data": Path("x")}, "--data goes with --tasks"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(changes, message, tmp_path):
    given = {"form": "mmvet", "files": {"questions": Path("q")}, "images": tmp_path, "output": tmp_path}
    with pytest.raises(ValueError, match=message):
        MirrorConfig(**{**given, **changes})


def test_flags_are_read_and_refused_on_the_command_line(capsys):
    flags = ["--data", "copy", "--tasks", "[pope, mme]", "--output", "mirrors"]
    config = parse(MirrorConfig, [*flags, "--suffix", ""])
    assert (config.tasks, config.suffix) == (["pope", "mme"], "")
    with pytest.raises((SystemExit, ValueError)) as refused:
        main([*flags, "--form", "pope"])
    assert "either --form" in str(refused.value) + capsys.readouterr().err


def test_what_is_not_there_is_named(pictures, tmp_path):
    entry = {"imagename": "gone.png", "question": "x?", "answer": "5", "capability": ["math"]}
    images = pictures("broken.png")
    (images / "broken.png").write_bytes(b"<html>")

    def config(content: object, **changes: object) -> MirrorConfig:
        questions = write(tmp_path / "q.json", content)
        given = {"form": "mmvet", "files": {"questions": questions}, "images": images, "output": tmp_path / "mirrors"}
        return MirrorConfig(**{**given, **changes})

    with pytest.raises(FileNotFoundError, match=r"1 of 1 pictures are not in .*, first gone\.png; set --images"):
        mirror(config({"v1_0": entry}))
    with pytest.raises(ValueError, match=r"broken\.png is no picture"):
        mirror(config({"v1_0": {**entry, "imagename": "broken.png"}}))
    with pytest.raises(ValueError, match=r"q\.json'\] are no mmvet: KeyError\('imagename'\)"):
        mirror(config({"v1_0": {}}))
    with pytest.raises(ValueError, match="no question"):
        mirror(config({}))
    assert not list((tmp_path / "mirrors").rglob("*"))


def test_data_of_a_split_is_found_as_the_hub_and_save_to_disk_write_it(tmp_path):
    (tmp_path / "ScienceQA-IMG").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"):
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "ScienceQA-IMG" / f"{name}.parquet")
    found = find_data(tmp_path, "test", "ScienceQA-IMG")
    names = [Path(file).name for file in found["dataset_kwargs"]["data_files"]["test"]]
    assert names == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    with pytest.raises(FileNotFoundError, match=r"no dev\.parquet or dev-\*\.parquet in .*; there is \['test-0"):
        find_data(tmp_path, "dev", None)
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(tmp_path / "saved")
    assert find_data(tmp_path / "saved", "test", None)["dataset_kwargs"] == {"load_from_disk": True}
    with pytest.raises(FileNotFoundError, match="no split 'dev'"):
        find_data(tmp_path / "saved", "dev", None)
    with pytest.raises(ValueError, match="save a DatasetDict"):
        find_data(tmp_path / "saved" / "test", "test", None)
    arrow = next((tmp_path / "saved" / "test").glob("*.arrow"))
    assert find_data(arrow, "test", None)["dataset_path"] == "arrow"


def test_a_task_reads_what_save_to_disk_wrote_and_its_arrow_file(tmp_path):
    row = {"question": "Is it?", "answer": "yes", "image": Image.new("RGB", (8, 8))}
    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list([row])}).save_to_disk(saved)
    for index, data in enumerate([saved, next((saved / "test").glob("*.arrow"))]):
        (file,) = mirror(MirrorConfig(data=data, tasks=["pope"], output=tmp_path / f"mirrors{index}"))
        _, doc, prompt, (picture,) = load(file)
        assert (doc["answer"], picture.size) == ("yes", (8, 8))
        assert prompt.startswith("Is it?\n")


def test_data_in_other_columns_leaves_no_mirror(tmp_path):
    data = tmp_path / "test.parquet"
    datasets.Dataset.from_dict({"text": ["Is it?"]}).to_parquet(data)
    with pytest.raises(ValueError, match="pope_local does not read this data: KeyError: 'question'"):
        mirror(MirrorConfig(data=data, tasks=["pope"], output=tmp_path / "mirrors"))
    assert not list((tmp_path / "mirrors").glob("*.yaml"))
