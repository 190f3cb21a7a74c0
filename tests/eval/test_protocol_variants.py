"""LLaVA's protocols beside lmms-eval's own: hand-worked scores, and where the two differ."""

from pathlib import Path

import pytest
from lmms_eval.tasks.pope.utils import pope_process_results
from lmms_eval.utils import load_yaml_config

from eval.metrics import yes_no_scores
from eval.tasks.pope_llava import pope_llava

TASKS = Path(__file__).resolve().parents[2] / "eval" / "tasks"


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("No, there is no dog.", "no"),
        ("There is not.", "no"),
        ("no,", "no"),
        # The first sentence counts.
        ("Yes. No doubt about it.", "yes"),
        # Whole words, and these three spellings: everything else is a yes, as in LLaVA's code.
        ("NO", "yes"),
        ("Not that I see", "yes"),
        ("Nothing", "yes"),
        ("no!", "yes"),
        ("", "yes"),
    ],
)
def test_llava_reads_an_answer_by_its_first_sentence(answer, meaning):
    assert pope_llava.parse(answer) == meaning


def items(category, pairs):
    docs = [{"question_id": i, "answer": truth, "category": category} for i, (_, truth) in enumerate(pairs)]
    return [pope_llava.process(doc, [answer]) for doc, (answer, _) in zip(docs, pairs, strict=True)]


def test_llava_scores_are_means_over_the_splits():
    # 2 true yes, 1 false yes, 1 true no: precision 2/3, recall 1, F1 4/5, accuracy 3/4, three of four said yes.
    random = items("random", [("Yes", "yes"), ("Yes, sure.", "yes"), ("Yes", "no"), ("No", "no")])
    # 1 true yes, 1 false no: precision 1, recall 1/2, F1 2/3, accuracy 1/2, one of two said yes.
    popular = items("popular", [("Sure", "yes"), ("No", "yes")])
    found = {name: [item[name] for item in random + popular] for name in ("f1", "accuracy", "precision", "yes_ratio")}
    assert pope_llava.mean_f1(found["f1"]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert pope_llava.mean_accuracy(found["accuracy"]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert pope_llava.mean_precision(found["precision"]) == pytest.approx((2 / 3 + 1) / 2)
    assert pope_llava.mean_recall(found["f1"]) == pytest.approx((1 + 1 / 2) / 2)
    assert pope_llava.mean_yes_ratio(found["yes_ratio"]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert pope_llava.mean_f1([item["f1_random"] for item in random]) == pytest.approx(4 / 5)
    assert "f1_random" not in popular[0]


def test_a_split_without_a_yes_has_the_scores_of_the_strict_parser():
    pairs = [("No", "yes"), ("No", "no"), ("no", "no")]
    ours = pope_llava.scores([item["f1"] for item in items("random", pairs)])
    strict = yes_no_scores([answer for answer, _ in pairs], [truth for _, truth in pairs])
    assert ours == {**{name: strict[name] for name in ours}, "accuracy": strict["accuracy"]["value"]}


def test_lmms_eval_counts_a_sentence_as_wrong_where_llava_does_not():
    doc = {"question_id": 0, "answer": "no", "category": "random"}
    assert pope_process_results(doc, ["No, there is none."])["pope_accuracy"]["score"] == 0
    assert pope_llava.process(doc, ["No, there is none."])["accuracy"]["score"] == 1


def test_a_truth_that_is_neither_is_an_error():
    with pytest.raises(ValueError, match="question 3 must have the answer"):
        pope_llava.process({"question_id": 3, "answer": "maybe", "category": "random"}, ["yes"])


def test_textvqa_accuracy_leaves_one_annotator_out():
    config = load_yaml_config(TASKS / "textvqa_ocr" / "textvqa_val_ocr.yaml", mode="full")
    answers = ["hi"] * 2 + ["hello"] * 8
    doc = {"question_id": 1, "answers": list(answers)}
    # Against each of the two "hi" one other agrees (1/3), against each of the eight others two do (2/3).
    expected = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert config["process_results"](doc, ["Hi!"])["exact_match"] == pytest.approx(expected)


def test_every_variant_says_its_protocol_and_parser():
    files = sorted(file for file in TASKS.rglob("*.yaml") if file.parent.name != "pope_scenes")
    assert len(files) == 6
    for file in files:
        metadata = load_yaml_config(file, mode="simple")["metadata"]
        assert metadata["protocol"] in ("llava", "lmms-eval")
        assert metadata["parser"]
