"""Tasks asked while a stage trains: logged with the run, and the training does not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file

from mllm.lmms_adapter import VisionMoeLlava
from mllm.lmms_tasks import numbers, run_task, task_manager
from mllm.stage_recipe import EvaluationSettings, LoraSettings, StageConfig
from mllm.train import run
from vision_moe.config import write_yaml

_YAML = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function colours.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6}
process_results: !function colours.measured
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
  - {metric: letters, aggregation: mean, higher_is_better: true}
"""
# Numbers that any other answer changes, right or wrong.
_CODE = """from PIL import Image

def visual(doc):
    return [Image.open(doc["picture"])]

def measured(doc, results):
    return {"length": len(results[0]), "letters": sum(ord(letter) for letter in results[0])}
"""


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a task: a question about each of five pictures."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for colour in ("red", "green", "blue", "white", "black"):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        picture = str(folder / f"{colour}.png")
        lines.append(json.dumps({"question": f"Is it {colour}?", "answer": "Yes", "picture": picture}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / "colours.yaml").write_text(_YAML.replace("QUESTIONS", str(folder / "questions.jsonl")))
    (folder / "colours.py").write_text(_CODE)
    return folder


def _finetune(colours: Path | None, **fields: Any) -> dict[str, Any]:
    settings = (
        {} if colours is None else {"tasks": ("colours",), "include_path": colours, "every": 2, "max_new_tokens": 5}
    )
    return {"evaluation": EvaluationSettings(**settings), **fields}


def _logged(folder: Path) -> tuple[list[tuple[int, dict[str, float]]], list[float]]:
    """(step, numbers of the task) of each evaluation, and the losses."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    asked = [
        (entry["step"], {name: value for name, value in entry.items() if name.startswith("eval/")})
        for entry in entries
        if "eval/colours/length" in entry
    ]
    return asked, [entry["loss"] for entry in entries if "loss" in entry]


def test_a_stage_logs_what_its_model_answers_and_trains_as_if_it_were_not_asked(
    make_config: Any, tmp_path: Path, colours: Path
) -> None:
    # Dropout draws at every step, and the first stage is left out for its time.
    lora = {"llm": "lora", "llm_lr": 3.0, "lora": LoraSettings(r=2, alpha=4, dropout=0.5)}
    only = {"pretrain": StageConfig(enabled=False)}
    asked = run(make_config(tmp_path / "asked", finetune=_finetune(colours, **lora), **only))
    plain = run(make_config(tmp_path / "plain", finetune=_finetune(None, **lora), **only))
    evaluations, losses = _logged(asked.parent)
    assert [step for step, _ in evaluations] == [0, 2, 3]
    assert (len(losses), losses) == (3, _logged(plain.parent)[1])
    expected, got = load_file(plain / "model.safetensors"), load_file(asked / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    # The last numbers are those of the model that is left.
    found = run_task(
        VisionMoeLlava(str(asked), device="cpu", max_new_tokens=5), "colours", task_manager(["colours"], [colours])
    )
    metrics, _ = numbers("colours", found)
    assert evaluations[-1][1] == {f"eval/colours/{name}": value for name, value in metrics.items()}
    assert evaluations[-1][1] != evaluations[0][1]


def test_an_unknown_task_stops_the_run_before_it_trains(
    make_config: Any, tmp_path: Path, colours: Path, monkeypatch
) -> None:
    # Without the two thousand YAML files of lmms-eval, which take long to index.
    monkeypatch.setattr("lmms_eval.tasks.__file__", str(colours / "none" / "__init__.py"))
    settings = EvaluationSettings(tasks=("colors",), include_path=colours)
    with pytest.raises(ValueError, match="unknown tasks colors; ours are colours"):
        run(make_config(tmp_path / "run", pretrain=StageConfig(enabled=False), finetune={"evaluation": settings}))


def test_evaluation_under_zero3_and_settings_out_of_range_are_refused(
    make_config: Any, tmp_path: Path, colours: Path
) -> None:
    with pytest.raises(ValueError, match=r"stage finetune evaluates while it trains, which ZeRO-3.*choose"):
        make_config(tmp_path, finetune=_finetune(colours), deepspeed="zero3")
    with pytest.raises(ValueError, match=r"evaluation\.every must be at least 1, but got 0"):
        EvaluationSettings(every=0)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero2"])
def test_two_processes_log_what_one_does(make_config: Any, tmp_path: Path, colours: Path, deepspeed: str) -> None:
    config = make_config(
        tmp_path / "two",
        pretrain=StageConfig(enabled=False),
        finetune=_finetune(colours, llm_lr=0.0, projector_lr=0.0),
        deepspeed=deepspeed,
    )
    write_yaml(config, tmp_path / "recipe.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "recipe.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    evaluations, _ = _logged(config.output)
    found = run_task(
        VisionMoeLlava(str(config.output / "model"), device="cpu", max_new_tokens=5),
        "colours",
        task_manager(["colours"], [colours]),
    )
    metrics, _ = numbers("colours", found)
    assert [step for step, _ in evaluations] == [0, 2, 3]
    # Five questions over two ranks, and weights that stay as they are.
    assert all(
        logged == {f"eval/colours/{name}": value for name, value in metrics.items()} for _, logged in evaluations
    )
