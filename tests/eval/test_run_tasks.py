"""eval.run with a stand-in for the chat model: what is asked, what is written, and when the exit code is not 0."""

import json
from types import SimpleNamespace

import pytest
import torch

from eval.run import main, summarize


class ColorChat:
    """Says Yes when the color asked for is the picture's; keeps what it was asked."""

    def __init__(self, broken=False):
        self.broken = broken
        self.asked = []
        self.model = SimpleNamespace(device=torch.device("cpu"))
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.25, 0.0]))

    def generate_batch(self, conversations, **settings):
        if self.broken:
            raise RuntimeError("out of memory")
        self.asked.append((conversations, settings))
        return [self._answer(messages[0]["content"], images[0]) for messages, images in conversations]

    def _answer(self, text, image):
        colors = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}
        return "Yes" if f" {colors.get(image.getpixel((0, 0)))} " in text else "No"


@pytest.fixture
def evaluate(pope_folder, tmp_path, monkeypatch):
    """Runs the command with a ColorChat; returns the chat, results.json and the lines of samples.jsonl."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def run(*flags, chat=None):
        chat = chat or ColorChat()
        monkeypatch.setattr("mllm.lmms_adapter.load", lambda *args, **kwargs: chat)
        output = tmp_path / "output"
        tasks = [] if "--tasks" in flags else ["--tasks", "pope_scenes"]
        main(["--model", str(model), "--data", str(pope_folder), "--output", str(output), *tasks, *flags])
        lines = (output / "samples.jsonl").read_text().splitlines()
        return chat, json.loads((output / "results.json").read_text()), [json.loads(line) for line in lines]

    run.output = tmp_path / "output"
    return run


def test_pope_scores_are_lmms_evals_own_and_ours_beside_them(evaluate):
    chat, written, samples = evaluate("--batch-size", "4")
    found = written["result"]["pope_scenes"]
    assert found["metrics"]["pope_accuracy"] == 1.0
    assert found["metrics"]["pope_f1_score"] == 1.0
    assert (found["n"], len(samples)) == (6, 6)
    assert found["yes_no"]["yes_ratio"] == 0.5
    assert found["yes_no"]["by_category"]["popular"]["accuracy"]["n"] == 2
    assert [len(conversations) for conversations, _ in chat.asked] == [4, 2]
    assert samples[0]["prompt"] == found["first_prompt"] == "Is there a red wall in the image?"
    assert samples[0]["answer"] == "Yes"
    assert written["model"]["weights_sha256"]
    assert written["environment"]["packages"]["lmms-eval"]


def test_each_question_is_one_user_turn_with_the_picture_in_front(evaluate):
    chat, _, _ = evaluate()
    messages, images = chat.asked[0][0][0]
    assert [message["role"] for message in messages] == ["user"]
    assert messages[0]["content"].startswith("<image>\nIs there a ")
    assert len(images) == 1
    assert chat.asked[0][1] == {"max_new_tokens": 128, "temperature": 0.0, "num_beams": 1}


def test_blank_pictures_leave_nothing_to_see(evaluate):
    chat, written, _ = evaluate("--blank-images")
    assert {image.getpixel((5, 5)) for talks, _ in chat.asked for _, (image,) in talks} == {(128, 64, 0)}
    assert written["result"]["pope_scenes"]["yes_no"]["yes_ratio"] == 0.0
    assert written["settings"]["blank_images"] is True


def test_limit_cap_and_prompt_reach_the_model(evaluate):
    chat, written, _ = evaluate("--limit", "2", "--max-new-tokens", "5", "--post-prompt", " Yes or no?")
    assert written["result"]["pope_scenes"]["n"] == 2
    assert chat.asked[0][1]["max_new_tokens"] == 5
    assert written["result"]["pope_scenes"]["first_prompt"] == "Is there a red wall in the image? Yes or no?"


def test_a_failed_task_is_a_non_zero_exit_that_says_why(evaluate):
    with pytest.raises(SystemExit) as exit_info:
        evaluate(chat=ColorChat(broken=True))
    assert "pope_scenes: RuntimeError: out of memory" in exit_info.value.code
    written = json.loads((evaluate.output / "results.json").read_text())
    assert written["result"] == {}
    assert "pope_scenes" in written["failed"]


def test_an_unknown_task_is_refused_before_any_is_run(evaluate):
    with pytest.raises(SystemExit, match=r"unknown tasks pope_moon; ours are .*pope_scenes"):
        evaluate("--tasks", "pope_scenes,pope_moon")


def test_data_without_questions_is_a_non_zero_exit(evaluate, tmp_path):
    with pytest.raises(SystemExit, match=r"no pope_test\.jsonl"):
        evaluate("--data", str(tmp_path))


def _found(metrics, num_samples=2, expected=2):
    sample = {"target": "yes", "filtered_resps": ["yes"], "arguments": ["Is it?"], "doc": {}}
    return {
        "results": {"task": {"alias": "task", **metrics}},
        "samples": {"task": [sample] * num_samples},
        "n-samples": {"task": {"effective": expected}},
        "configs": {"task": {}},
        "versions": {"task": 1.0},
    }


def test_summary_keeps_numbers_and_names_what_has_none():
    found = _found({"accuracy,none": 0.5, "accuracy_stderr,none": "N/A", "submission,none": None})
    summary = summarize(found)["task"]
    assert summary["metrics"] == {"accuracy": 0.5}
    assert summary["without_number"] == ["submission"]


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (_found({"gpt_score,none": None}), "no numeric result"),
        (_found({}), "no numeric result"),
        (_found({"accuracy,none": float("nan")}), "not finite"),
        (_found({"accuracy,none": 0.5}, num_samples=1), "1 answers to 2 questions"),
        ({"results": {}, "samples": {}}, "no samples"),
    ],
)
def test_a_missing_result_is_an_error(found, match):
    with pytest.raises(ValueError, match=match):
        summarize(found)
