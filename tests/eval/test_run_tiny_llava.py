"""eval.run and lmms-eval's own command on a real, tiny, untrained LLaVA folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.run import main
from mllm.generate import load

CHECKOUT = Path(__file__).resolve().parents[2]


def test_answers_are_those_of_the_chat_model(llava_folder, pope_folder, tmp_path):
    flags = ["--tasks", "pope_scenes", "--data", str(pope_folder), "--max-new-tokens", "4", "--batch-size", "4"]
    main(["--model", str(llava_folder), "--output", str(tmp_path), "--device", "cpu", *flags])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    written = json.loads((tmp_path / "results.json").read_text())["result"]["pope_scenes"]
    assert written["n"] == len(samples) == 6
    assert written["yes_no"]["accuracy"]["value"] == pytest.approx(written["metrics"]["pope_accuracy"])
    assert any(sample["answer"] for sample in samples)
    chat = load(llava_folder, device="cpu")
    for sample in samples:
        image = Image.open(pope_folder / "images" / sample["doc"]["image_source"])
        messages = [{"role": "user", "content": f"<image>\n{sample['prompt']}"}]
        assert sample["answer"] == chat.generate(messages, [image], max_new_tokens=4)


@pytest.mark.slow
def test_lmms_evals_own_command_runs_the_same_task(llava_folder, pope_folder, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "vision_moe_llava", "--tasks", "pope_scenes"]
    command += ["--model_args", f"pretrained={llava_folder},max_new_tokens=4", "--device", "cpu"]
    command += ["--include_path", str(CHECKOUT / "eval" / "tasks"), "--output_path", str(tmp_path)]
    environment = {**os.environ, "VISION_MOE_SCENES": str(pope_folder)}
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=300)
    # Its exit code says nothing, so the file must.
    (results,) = tmp_path.rglob("*_results.json")
    assert "pope_accuracy,none" in json.loads(results.read_text())["results"]["pope_scenes"]
