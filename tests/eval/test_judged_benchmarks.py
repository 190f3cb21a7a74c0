"""MM-Vet, MMBench and LLaVA-Bench by a scripted judge: hand-worked scores, and what a failed judgement does to them."""

import importlib

import pytest

from eval.tasks.judged import llava_bench, mmbench, mmvet

MMVET_DOC = {"question": "What is x?", "answer": "-1<AND>-5", "capability": "ocr,math"}


def test_mmvet_grades_by_capability_and_a_failed_grade_is_no_zero(judge_endpoint, make_judge):
    judge_endpoint.script = [judge_endpoint.said("0.4 | because")]
    judge = make_judge()
    found = mmvet.process(MMVET_DOC, ["x = 3"], judge)
    judged = found.pop("judge")
    assert found == {"judge_failed": 0, "gpt_eval_score": 40.0, "ocr": 40.0, "math": 40.0}
    assert judged["answer"] == "0.4 | because"
    prompt = judge_endpoint.asked[0]["messages"][0]["content"]
    assert prompt.startswith("Compare the ground truth and prediction from AI models")
    assert prompt.endswith("\nWhat is x? | -1 <AND> -5 | x = 3 | ")
    assert "gpt_query_prompt | Ground truth" in prompt
    judge_endpoint.script = [judge_endpoint.said("1.5")]
    found = mmvet.process_official(MMVET_DOC, ["x = 4"], judge)
    assert found.pop("judge")["value"] is None
    assert found == {"judge_failed": 1}
    assert (
        "\n\nQuestion | Ground truth | Prediction | Correctness\n" in judge_endpoint.asked[-1]["messages"][0]["content"]
    )


def test_llava_bench_is_the_ratio_of_totals(judge_endpoint, make_judge):
    doc = {"question": "Why?", "gpt_answer": "So.", "caption": "A hill.", "category": "conv"}
    judge_endpoint.script = [
        judge_endpoint.said("8 6\nThe first is better."),
        judge_endpoint.said("10, 3\n"),
        judge_endpoint.said("9"),
        judge_endpoint.said("11 2"),
        judge_endpoint.said("one two"),
    ]
    judge = make_judge()
    pairs = [llava_bench.process(doc, [answer], judge)["gpt_eval_llava_conv"] for answer in ("a", "b")]
    assert pairs == [[8.0, 6.0], [10.0, 3.0]]
    # (6 + 3) / (8 + 10)
    assert llava_bench.relative_score(pairs) == 50.0
    assert llava_bench.process(doc, ["c"], judge)["judge_failed"] == 1
    assert "[Assistant 2]\na\n\n[End of Assistant 2]" in judge_endpoint.asked[0]["messages"][0]["content"]


MMBENCH_DOC = {"question": "What is it?", "A": "a cat", "B": "a dog", "C": "nan", "D": "nan", "answer": "B", "index": 7}


def test_mmbench_asks_the_judge_only_where_the_rules_find_no_option(judge_endpoint, make_judge):
    judge = make_judge()
    right = mmbench.process(MMBENCH_DOC, ["B"], judge)
    assert right == {"gpt_eval_score": {"question": 7, "right": True}, "judge_failed": 0}
    assert mmbench.process(MMBENCH_DOC, ["Clearly a cat"], judge)["gpt_eval_score"]["right"] is False
    assert not judge_endpoint.asked
    judge_endpoint.script = [judge_endpoint.said("B")]
    rotated = mmbench.process({**MMBENCH_DOC, "index": 1_000_007}, ["a hound"], judge)
    assert rotated["gpt_eval_score"] == {"question": 7, "right": True}
    judge_endpoint.script = [judge_endpoint.said("whatever")]
    unread = mmbench.process(MMBENCH_DOC, ["a beast"], judge)
    assert (unread["gpt_eval_score"]["right"], unread["judge_failed"]) == (None, 1)


def test_mmbench_counts_a_question_when_every_rotation_is_right():
    def items(*rights: bool | None) -> list[dict[str, object]]:
        return [
            {"question": question, "right": right} for question, right in zip((1, 1, 2, 2, 3, 3), rights, strict=True)
        ]

    assert mmbench.circular_accuracy(items(True, True, True, False, True, True)) == pytest.approx(200 / 3)
    # Wrong once is wrong, whatever the other was; right once and unread once is not known.
    assert mmbench.circular_accuracy(items(True, True, None, False, True, None)) == 50.0
    with pytest.raises(ValueError, match="unknown in all of 3 questions"):
        mmbench.circular_accuracy(items(None, None, None, True, True, None))


@pytest.mark.slow
def test_the_grading_prompt_is_the_one_that_lmms_eval_asks_with(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    module = importlib.import_module("lmms_eval.tasks.mmvet.utils")
    assert mmvet._examples() == module.MM_VET_PROMPT
