"""eval.run with a stand-in for the chat model: what is asked, what is written, and when the exit code is not 0."""

import json
from types import SimpleNamespace

import pytest
import torch

from eval.run import main, model_folders
from eval.task_results import summarize

COLORS = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}


class ColorChat:
    """Says Yes when the color asked for is the picture's; keeps what it was asked.

    Args:
        dies_at: a batch of this number ends the process, as far as Python can tell.
        error: raised instead of an answer.
    """

    template = "v1"

    def __init__(self, dies_at=None, error=None):
        self.dies_at, self.error = dies_at, error
        self.asked = []
        config = SimpleNamespace(
            vision_config=SimpleNamespace(model_type="clip_vision_model", image_size=32),
            text_config=SimpleNamespace(model_type="llama"),
            image_seq_length=4,
        )
        self.model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=config)
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.25, 0.0]))

    def generate_batch(self, conversations, **settings):
        if self.error is not None:
            raise self.error
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((conversations, settings))
        return [self._answer(messages[0]["content"], images[0]) for messages, images in conversations]

    @property
    def num_asked(self):
        return sum(len(conversations) for conversations, _ in self.asked)

    def _answer(self, text, image):
        return "Yes" if f" {COLORS.get(image.getpixel((0, 0)))} " in text else "No"


class YesChat(ColorChat):
    """Says Yes to everything."""

    def _answer(self, text, image):
        return "Yes"


@pytest.fixture
def evaluate(pope_folder, tmp_path, monkeypatch):
    """Runs the command with a ColorChat; returns the chat, results.json and the lines of samples.jsonl."""
    model = tmp_path / "tower"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def run(*flags, chat=None, folder="."):
        chat = chat or ColorChat()
        monkeypatch.setattr("mllm.lmms_adapter.load", lambda *args, **kwargs: chat)
        output = tmp_path / "output"
        tasks = [] if {"--tasks", "--suite"} & set(flags) else ["--tasks", "pope_scenes"]
        main(["--model", str(model), "--data", str(pope_folder), "--output", str(output), *tasks, *flags])
        lines = (output / folder / "samples.jsonl").read_text().splitlines()
        return chat, json.loads((output / folder / "results.json").read_text()), [json.loads(line) for line in lines]

    run.model, run.output = model, tmp_path / "output"
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


def test_a_record_says_how_its_numbers_came_about(evaluate):
    _, written, samples = evaluate()
    found = written["result"]["pope_scenes"]
    assert "pope_process_results" in found["parser"]["process_results"]
    assert found["prompts"]["default"]["post_prompt"] == ""
    assert found["generation_kwargs"]["max_new_tokens"] == 128
    assert found["judge"] is None
    # Two questions about each of three pictures are drawn together.
    assert (found["n"], found["units"]) == (6, 3)
    assert found["intervals"]["pope_f1_score"] == [1.0, 1.0]
    assert "pope_yes_ratio" not in found["intervals"]
    assert found["cost"]["asked"] == 6
    assert found["cost"]["seconds"] > 0
    assert samples[0]["metrics"]["pope_accuracy"]["score"] == 1.0
    assert written["model"]["weights_sha256"]
    assert (written["model"]["name"], written["model"]["image_size"]) == ("tower", 32)
    assert written["environment"]["packages"]["lmms-eval"]
    assert written["settings"]["seed"] == 0


def test_each_question_is_one_user_turn_with_the_picture_in_front(evaluate):
    chat, _, _ = evaluate()
    messages, images = chat.asked[0][0][0]
    assert [message["role"] for message in messages] == ["user"]
    assert messages[0]["content"].startswith("<image>\nIs there a ")
    assert len(images) == 1
    assert chat.asked[0][1] == {"max_new_tokens": 128, "temperature": 0.0, "num_beams": 1}


def test_blank_pictures_leave_nothing_to_see(evaluate):
    chat, written, _ = evaluate("--pictures", "blank", folder="blank")
    assert {image.getpixel((5, 5)) for talks, _ in chat.asked for _, (image,) in talks} == {(128, 64, 0)}
    assert written["result"]["pope_scenes"]["yes_no"]["yes_ratio"] == 0.0
    assert written["settings"]["pictures"] == "blank"


def test_shuffled_pictures_are_of_the_task_but_never_their_own(evaluate):
    chat, written, samples = evaluate("--pictures", "shuffled", "--batch-size", "1", folder="shuffled")
    shown = {talk[0][0]["content"].removeprefix("<image>\n"): talk[1][0] for (talk,), _ in chat.asked}
    for sample in samples[::2]:
        # The first of a picture's two questions names its color.
        assert f" {COLORS[shown[sample['prompt']].getpixel((0, 0))]} " not in sample["prompt"]
    assert written["settings"]["pictures"] == "shuffled"
    assert written["result"]["pope_scenes"]["yes_no"]["yes_ratio"] == 0.0


def test_a_crash_in_the_middle_asks_the_model_nothing_twice(evaluate):
    dying = ColorChat(dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--batch-size", "2", chat=dying)
    assert dying.num_asked == 4
    # Killed while it wrote a third batch.
    with (evaluate.output / "answers" / "rank0.jsonl").open("a") as file:
        file.write('["half a li')
    chat, written, samples = evaluate("--batch-size", "2")
    assert chat.num_asked == 2
    assert written["result"]["pope_scenes"]["cost"] | {"seconds": 0} == {"seconds": 0, "asked": 2, "from_answers": 4}
    assert written["result"]["pope_scenes"]["metrics"]["pope_accuracy"] == 1.0
    assert len(samples) == 6
    again, _, samples_again = evaluate("--batch-size", "2")
    assert again.num_asked == 0
    assert samples_again == samples


def test_answers_to_other_questions_or_of_other_weights_are_not_taken(evaluate):
    evaluate()
    for flags in (["--post-prompt", " Really?"], ["--max-new-tokens", "3"], ["--no-resume"]):
        assert evaluate(*flags)[0].num_asked == 6, flags
    assert evaluate()[0].num_asked == 0
    (evaluate.model / "model.safetensors").write_bytes(b"other weights")
    assert evaluate()[0].num_asked == 6


def test_limit_cap_and_prompt_reach_the_model(evaluate):
    chat, written, _ = evaluate("--limit", "2", "--max-new-tokens", "5", "--post-prompt", " Yes or no?")
    assert written["result"]["pope_scenes"]["n"] == 2
    assert chat.asked[0][1]["max_new_tokens"] == 5
    assert written["result"]["pope_scenes"]["first_prompt"] == "Is there a red wall in the image? Yes or no?"


def test_a_suite_brings_tasks_and_settings_and_a_flag_wins(evaluate, tmp_path):
    chat, written, _ = evaluate("--suite", "scenes")
    assert list(written["result"]) == ["pope_scenes"]
    assert chat.asked[0][1]["max_new_tokens"] == 16
    suite = tmp_path / "mine.yaml"
    suite.write_text("tasks: [pope_scenes]\nlimit: 4\n")
    assert evaluate("--suite", str(suite))[1]["result"]["pope_scenes"]["n"] == 4
    assert evaluate("--suite", str(suite), "--limit", "2")[1]["result"]["pope_scenes"]["n"] == 2


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--suite", "papers"], "no suite 'papers': give paper, quick, scenes"),
        (["--tasks", "pope_scenes,pope_moon"], "unknown tasks pope_moon; ours are .*pope_scenes"),
        (["--pictures", "own,grey"], "--pictures takes own, blank, shuffled"),
        (["--include-path", "/no/such"], "no folder of task YAML files"),
        (["--limit", "0"], "at least one task and question"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(evaluate, flags, match):
    chat = ColorChat()
    with pytest.raises(SystemExit, match=match):
        evaluate(*flags, chat=chat)
    assert not evaluate.output.exists()


def test_models_are_named_by_their_folders_and_need_different_names():
    assert model_folders(["out/moe/model", "dense"]) == {"moe": "out/moe/model", "dense": "dense"}
    assert model_folders(["a=x/model", "b=x/model"]) == {"a": "x/model", "b": "x/model"}
    with pytest.raises(ValueError, match="NAME=b/x"):
        model_folders(["a/x", "b/x"])


def test_a_failed_task_is_a_non_zero_exit_that_says_why(evaluate):
    with pytest.raises(SystemExit) as exit_info:
        evaluate(chat=ColorChat(error=RuntimeError("out of memory")))
    assert "pope_scenes: RuntimeError: out of memory" in exit_info.value.code
    written = json.loads((evaluate.output / "results.json").read_text())
    assert written["result"] == {}
    assert "pope_scenes" in written["failed"]


def test_data_without_questions_is_a_non_zero_exit(evaluate, tmp_path):
    with pytest.raises(SystemExit, match=r"no pope_test\.jsonl"):
        evaluate("--data", str(tmp_path))


def test_several_models_and_controls_are_compared_in_one_report(evaluate, pope_folder, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    chats = {str(evaluate.model): ColorChat(), str(other): YesChat()}
    monkeypatch.setattr("mllm.lmms_adapter.load", lambda folder, **kwargs: chats[folder])
    models = ["--model", f"sees={evaluate.model}", "--model", f"nods={other}"]
    output = tmp_path / "both"
    main([*models, "--suite", "scenes", "--data", str(pope_folder), "--output", str(output), "--pictures", "own,blank"])
    text, page = ((output / f"report.{kind}").read_text() for kind in ("md", "html"))
    # F1 of always yes at half of the truths: 2 * 0.5 * 1 / 1.5.
    assert "| pope_scenes | pope_f1_score | 1.0000 | 0.6667 | -0.3333 [-0.3333, -0.3333] | yes | 6 | 3 |" in text
    assert "Difference: A = sees, B = sees, blank pictures" in text
    assert "A = sees, blank pictures, B = nods" not in text
    # Three questions ask for white walls that are not there, each with its picture.
    shown = [line for line in text.splitlines() if line.startswith("| ![](report_pictures/")]
    assert len(shown) == 3
    assert all("| no | No | Yes | A |" in line for line in shown)
    pictures = {line.split("(")[1].split(")")[0] for line in shown}
    assert all((output / picture).is_file() for picture in pictures)
    assert page.count('<img src="report_pictures/') == len(pictures) == 3


def _found(metrics, num_samples=2, expected=2):
    sample = {"doc_id": 0, "target": "yes", "filtered_resps": ["yes"], "arguments": ["Is it?"], "doc": {}}
    return {
        "results": {"task": {"alias": "task", **metrics}},
        "samples": {"task": [sample] * num_samples},
        "n-samples": {"task": {"effective": expected}},
        "configs": {"task": {}},
        "versions": {"task": 1.0},
    }


def test_summary_keeps_numbers_and_names_what_has_none():
    found = _found({"accuracy,none": 0.5, "accuracy_stderr,none": "N/A", "submission,none": None})
    results, lines = summarize(found, seed=0)
    summary = results["task"]
    assert summary["metrics"] == {"accuracy": 0.5}
    assert summary["without_number"] == ["submission"]
    assert summary["intervals"] == {}
    assert len(lines) == 2


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
        summarize(found, seed=0)
