"""Every task of the paper's table on stand-in data in the columns of its Hub data, through eval.mirror and eval.run.

The pictures differ in color, and the stand-in model looks the right answer up by it: each task must give full marks.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from datasets import Features, Image, List, Value
from PIL import Image as Pictures

from eval.mirror import MirrorConfig, mirror
from eval.run import main
from mllm.lmms_tasks import task_manager

COLORS = [(60 * index, 0, 255 - 60 * index) for index in range(4)]
TASKS = yaml.safe_load(Path(__file__).with_name("paper_tasks.yaml").read_text())
VQAV2_ANSWERS = List({"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")})


class LookupChat:
    """Answers by the color of the first picture."""

    template = "v1"

    def __init__(self, answers):
        self.answers = answers
        self.prompts = []
        config = SimpleNamespace(
            vision_config=SimpleNamespace(model_type="clip_vision_model", image_size=8),
            text_config=SimpleNamespace(model_type="llama"),
            image_seq_length=1,
        )
        self.model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=config)
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.5, 0.5]))

    def generate_batch(self, conversations, **settings):
        self.prompts += [messages[0]["content"] for messages, _ in conversations]
        return [self.answers[COLORS.index(images[0].getpixel((0, 0)))] for _, images in conversations]


def picture(index):
    return Pictures.new("RGB", (8, 8), COLORS[index])


def write_stand_in(folder, task):
    """Parquet named and typed as on the Hub."""
    rows = [dict(row) for row in task["rows"]]
    for index, row in enumerate(rows):
        row["image"] = [picture(color) for color in row["image"]] if "image" in row else picture(index)
    image = List(Image()) if isinstance(rows[0]["image"], list) else Image()
    inferred = datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in rows]).features
    features = Features({**inferred, "image": image})
    if "multiple_choice_answer" in features:
        features["answers"] = VQAV2_ANSWERS
    data = datasets.Dataset.from_list(rows, features=features)
    subset = folder / (task["subset"] or "data")
    subset.mkdir(parents=True)
    data.to_parquet(subset / f"{task['split']}-00000-of-00001.parquet")


def write_gqa(folder):
    """GQA's pictures lie in another subset than its questions."""
    question = {"id": "201", "imageId": "n1", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes."}
    tables = {
        "instructions": datasets.Dataset.from_list([question]),
        "images": datasets.Dataset.from_list(
            [{"id": "n1", "image": picture(0)}], features=Features({"id": Value("string"), "image": Image()})
        ),
    }
    for name, table in tables.items():
        (folder / f"testdev_balanced_{name}").mkdir(parents=True)
        table.to_parquet(folder / f"testdev_balanced_{name}" / "testdev-00000-of-00001.parquet")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """lmms-eval's tasks write submission files into the working directory."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _judge(judge_endpoint, tmp_path, monkeypatch):
    """A judge that is pleased with everything, in the form that each benchmark asks for."""

    def reply(prompt):
        if "most similar to the answer" in prompt:
            return judge_endpoint.said("B")
        return judge_endpoint.said("8 4" if "[System]" in prompt else "1.0")

    judge_endpoint.script = [reply]
    monkeypatch.setenv("VISION_MOE_JUDGE_URL", judge_endpoint.url)
    monkeypatch.setenv("VISION_MOE_JUDGE_MODEL", "stub")
    monkeypatch.setenv("VISION_MOE_JUDGE_CACHE", str(tmp_path / "judge"))


@pytest.fixture
def mirrors(tmp_path):
    """mirrors(*tasks) -> folder of mirrors of stand-in data."""

    def make(*tasks):
        for name in tasks:
            data = tmp_path / "hub" / name
            if name == "gqa":
                write_gqa(data)
            else:
                write_stand_in(data, TASKS[name])
            mirror(MirrorConfig(data=data, tasks=[name], output=tmp_path / "mirrors"))
        return tmp_path / "mirrors"

    return make


def run(model, output, include_path, tasks, *flags):
    names = ",".join(f"{name}_local" for name in tasks)
    main(
        ["--model", str(model), "--output", str(output), "--include-path", str(include_path), "--tasks", names, *flags]
    )
    return json.loads((output / "results.json").read_text())["result"]


@pytest.fixture
def chat_folder(tmp_path, monkeypatch):
    """chat_folder(answers) -> a LookupChat, and the folder that loads as it."""

    def make(answers):
        chat = LookupChat(answers)
        monkeypatch.setattr("mllm.lmms_adapter.load", lambda *args, **kwargs: chat)
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        return chat, folder

    return make


def check_full_marks(name, mirrors, chat_folder, tmp_path):
    task = TASKS[name]
    chat, model = chat_folder(task["answers"])
    found = run(model, tmp_path / "output", mirrors(name), [name])[f"{name}_local"]
    assert {metric: found["metrics"][metric] for metric in task["metrics"]} == pytest.approx(task["metrics"])
    assert found["n"] == len(task["rows"])
    return chat


def test_a_judged_task_gives_full_marks_on_stand_in_data(mirrors, chat_folder, tmp_path):
    chat = check_full_marks("mmvet_llava", mirrors, chat_folder, tmp_path)
    assert sorted(chat.prompts) == ["<image>\nx?"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"mmvet_llava"}))
def test_every_task_gives_full_marks_on_stand_in_data(name, mirrors, chat_folder, tmp_path):
    check_full_marks(name, mirrors, chat_folder, tmp_path)


def test_a_judge_that_is_not_there_is_an_error_before_the_model_is_asked(
    mirrors, chat_folder, tmp_path, judge_endpoint
):
    chat, model = chat_folder(["5", "five"])
    folder = mirrors("mmvet_llava")
    judge_endpoint.script = [(401, "{}")]
    with pytest.raises(SystemExit, match=r"the judge 'stub' at .* cannot be asked: AuthenticationError"):
        run(model, tmp_path / "output", folder, ["mmvet_llava"])
    assert chat.prompts == []


@pytest.mark.slow
def test_a_mirror_of_the_same_name_stands_in_for_lmms_evals_own_task():
    write_stand_in(Path("hub"), TASKS["pope"])
    mirror(MirrorConfig(data=Path("hub"), tasks=["pope"], output=Path("same"), suffix=""))
    manager = task_manager(["pope", "mme"], [Path("same")])
    assert manager.load_task_or_group("pope")["pope"].config.dataset_path == "parquet"


@pytest.mark.slow
def test_a_real_llava_gets_a_number_from_every_task(llava_folder, mirrors, tmp_path):
    tasks = [*TASKS, "gqa"]
    flags = ["--max-new-tokens", "3", "--device", "cpu"]
    found = run(llava_folder, tmp_path / "output", mirrors(*tasks), tasks, *flags)
    assert sorted(found) == sorted(f"{name}_local" for name in tasks)
    assert all(entry["metrics"] and entry["first_prompt"] for entry in found.values())


@pytest.mark.slow
def test_lmms_evals_own_command_gives_the_same_numbers(llava_folder, mirrors, tmp_path, judge_endpoint):
    tasks = ["mmvet_llava", "pope_llava"]
    folder = mirrors(*tasks)
    found = run(llava_folder, tmp_path / "output", folder, tasks, "--max-new-tokens", "3", "--device", "cpu")
    # Our own files are loaded by their paths, from wherever the command is run.
    command = [sys.executable, "-m", "lmms_eval", "--model", "vision_moe_llava", "--include_path", str(folder)]
    command += ["--model_args", f"pretrained={llava_folder},max_new_tokens=3", "--device", "cpu"]
    command += ["--tasks", ",".join(f"{name}_local" for name in tasks), "--output_path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=900)
    (file,) = (tmp_path / "theirs").rglob("*_results.json")
    theirs = json.loads(file.read_text())
    for task, entry in found.items():
        numbers = {name: theirs["results"][task][f"{name},none"] for name in entry["metrics"]}
        assert numbers == pytest.approx(entry["metrics"])
    assert theirs["configs"]["mmvet_llava_local"]["metadata"]["judge"]["model"] == "stub"
    assert len(judge_endpoint.asked) == 3  # the first command's preflight and two answers; the second asked nothing
