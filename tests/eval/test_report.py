"""The report of several records: the paper's columns, marks, names, and what is refused."""

import json

import pytest
import yaml

from eval.pairs import differences_table, disagreements, pairs
from eval.paper_tables import multimodal_table, published, zero_shot_table
from eval.records import read_records
from eval.report import escaped, main
from eval.suites import FOLDER, read_suite

PAPER = ("MME", "POPE", "MMBench", "MM-Vet", "VizWiz", "MMStar", "OCRBench", "VQAv2", "TextVQA", "GQA")


def _entry(metrics, n, **fields):
    return {"metrics": metrics, "intervals": {}, "n": n, "judge": None, **fields}


@pytest.fixture
def write(tmp_path):
    """write(name, result, **settings) -> the record's file, as eval.run writes it."""

    def run(name, result, lines=(), image_size=336, benchmark="lmms_eval", **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        common = {"pictures": "own", "post_prompt": None, "max_new_tokens": None, "quantization": None}
        content = {
            "benchmark": benchmark,
            "model": {"path": f"{name}/model", "weights_sha256": "0" * 64, "image_size": image_size},
            "settings": {**common, **settings},
            "result": result,
            "environment": {"commit": "c0ffee", "packages": {"lmms-eval": "0.7.3"}},
            "time": "2026-01-01T00:00:00Z",
        }
        (folder / "results.json").write_text(json.dumps(content))
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder / "results.json"

    return run


def _lines(scores, task="pope", doc_id=0):
    return [
        {
            "task": task,
            "doc_id": doc_id + index,
            "doc": {"id": index},
            "prompt": "Is it?",
            "target": "yes",
            "answer": "yes" if value else "no",
            "metrics": {"extra": None, "score": value},
        }
        for index, value in enumerate(scores)
    ]


def test_the_papers_numbers_are_those_of_its_table():
    rows = {row["name"]: row for row in published()["multimodal"]["rows"]}
    assert tuple(rows["Vicuna-7B, CLIP-MoE"])[1:] == PAPER
    # The losses that the paper reports beside its gains, and the gains it names in the text.
    dense, moe = (rows[f"Vicuna-7B, {tower}"] for tower in ("OpenAI CLIP-L/336", "CLIP-MoE"))
    assert moe["MME"] - dense["MME"] == pytest.approx(-24.5)
    dense, moe = (rows[f"Vicuna-13B, {tower}"] for tower in ("OpenAI CLIP-L/336", "CLIP-MoE"))
    gains = {name: round(moe[name] - dense[name], 1) for name in ("MMBench", "MM-Vet", "VizWiz", "TextVQA")}
    assert gains == {"MMBench": 1.6, "MM-Vet": 4.2, "VizWiz": 2.5, "TextVQA": -0.4}


def test_every_task_of_the_papers_suite_has_its_column():
    measured = {task for column in published()["multimodal"]["columns"].values() for task in column["tasks"]}
    assert set(read_suite("paper").tasks) <= measured
    assert set(PAPER) < set(published()["multimodal"]["columns"])
    for file in FOLDER.glob("*.yaml"):
        assert read_suite(file.stem).tasks == yaml.safe_load(file.read_text())["tasks"]


def test_measured_numbers_stand_in_the_papers_columns_and_units(write):
    result = {
        "mme": _entry({"mme_perception_score": 1486.24, "mme_cognition_score": 300.0}, 2374),
        "pope_local": _entry({"pope_f1_score": 0.8641}, 9000) | {"intervals": {"pope_f1_score": [0.86, 0.87]}},
    }
    text = multimodal_table(read_records([write("mine", result)]))
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert header == f"| model | {' | '.join(PAPER)} |"
    assert rows[1].startswith("| Vicuna-7B, CLIP-MoE (paper) | 1486.2 | 86.4 | 66.1 |")
    assert rows[-1].startswith("| mine | 1486.2 | 86.4 [86.0, 87.0] (a) |  |")
    assert "does not name its measure" in text.split("- (a) ")[1]


def test_what_differs_in_protocol_is_marked(write):
    result = {
        "mmvet_judge": _entry({"gpt_eval_score": 31.0}, 218) | {"judge": {"model": "judge-1"}},
        "gqa": _entry({"exact_match": 0.5}, 10),
    }
    settings = {"max_new_tokens": 8, "quantization": "4bit", "post_prompt": " Short.", "pictures": "blank"}
    text = multimodal_table(read_records([write("mine", result, image_size=224, **settings)]))
    for note in (
        "judged by judge-1; the paper does not name its judge",
        "10 of 12578 questions",
        "answers of at most 8 tokens",
        "the prompt ends with ' Short.'",
        "pictures of 224 pixels, 336 in the paper",
        "language model in 4bit",
        "control: blank pictures",
    ):
        assert note in text
    row = next(line for line in text.splitlines() if line.startswith("| mine, blank pictures"))
    # Twelve columns of the paper come first; ScienceQA and SEED were not measured and have none.
    assert row.count("|") == len(PAPER) + 2


def test_records_without_a_task_of_the_paper_make_no_table_of_it(write):
    assert multimodal_table(read_records([write("mine", {"other": _entry({"score": 1.0}, 3)})])) == ""


def test_zero_shot_stands_beside_the_papers_rows(write):
    accuracy = {"top-1": {"value": 0.7461, "interval": [0.742, 0.75], "n": 50000}}
    file = write("clip", {"accuracy": accuracy}, benchmark="zero_shot", dataset="imagenet")
    rows = zero_shot_table(read_records([file])).splitlines()
    assert rows[0] == "| model | imagenet |"
    assert "| CLIP-MoE, ShareGPT4V (paper) | 74.6 |" in rows
    assert rows[-1] == "| clip | 74.6 [74.2, 75.0], n = 50000 |"


def test_two_models_and_a_models_controls_are_paired_and_nothing_else(write):
    own = [write(name, {}) for name in ("a", "b", "c")]
    blank = write("a/blank", {}, pictures="blank")
    content = json.loads(blank.read_text())
    for file in (*own, blank):
        content = json.loads(file.read_text())
        content["model"]["name"] = "a" if file == blank else file.parent.name
        file.write_text(json.dumps(content))
    found = [(a.name, b.name) for a, b in pairs(read_records([blank, *own]))]
    assert found == [("a", "a, blank pictures"), ("a", "b"), ("a", "c"), ("b", "c")]


def test_disagreements_are_those_that_differ_most_one_side_after_the_other(write):
    scores = [1.0, 0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]
    records = read_records([write(name, {}, _lines(of)) for name, of in zip("ab", scores, strict=True)])
    found = disagreements(*records, "pope", number=3, seed=0)
    assert [(pair.a["doc_id"], pair.score_a, pair.score_b) for pair in found] == [(3, 1, 0), (4, 1, 0), (1, 0, 1)]


def test_records_over_other_questions_are_not_compared(write):
    result = {"pope": _entry({"score": 0.5}, 2)}
    a, b = read_records([write("a", result, _lines([1, 0])), write("b", result, _lines([0, 1], doc_id=5))])
    assert "| pope | not compared: other questions |" in differences_table(a, b, seed=0)
    assert disagreements(a, b, "pope", number=3, seed=0) == []


def test_a_report_whose_data_have_gone_says_so_instead_of_a_picture(write, tmp_path, capsys):
    settings = {"include_path": [], "data": str(tmp_path / "gone")}
    files = []
    for name, scores in (("a", [1, 0]), ("b", [1, 1])):
        result = {"pope_scenes": _entry({"score": sum(scores) / 2}, 2)}
        files.append(write(name, result, _lines(scores, task="pope_scenes"), **settings))
    main([*map(str, files), "--output", str(tmp_path / "report")])
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    assert r"no picture: no pope\_test.jsonl in" in text
    assert "| Is it? | yes | no | yes | B |" in text


def test_an_answer_cannot_break_its_cell():
    assert escaped("a | b\n\n<script>*x*") == r"a \| b \<script\>\*x\*"
    assert escaped("x" * 500) == "x" * 400 + " ..."


@pytest.mark.parametrize("flags", [[], ["--output", "report"]])
def test_what_is_no_record_is_an_error_with_a_way_out(tmp_path, flags):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="no record in"):
        main([str(tmp_path), *flags])
    with pytest.raises(SystemExit, match="is no record; name the JSON"):
        main([str(tmp_path / "other.json"), *flags])
    with pytest.raises(SystemExit, match="no file or folder"):
        main([str(tmp_path / "missing"), *flags])
