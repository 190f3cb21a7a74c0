"""eval.run and lmms-eval's own command on a real, tiny, untrained LLaVA folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from eval.run import main
from mllm.adapter import AdapterInfo, read_info, save_adapter
from mllm.assemble import assemble
from mllm.generate import load
from mllm.lora import add_lora
from mllm.merge import merge_adapter
from mllm.pretrained import load_processor
from mllm.stage_recipe import LoraSettings
from vision_moe.files import weights_sha256
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel

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


def _run(folder, pope_folder, output, *flags):
    """eval.run's record and samples, a few tokens an answer."""
    common = ["--tasks", "pope_scenes", "--data", str(pope_folder), "--max-new-tokens", "4", "--device", "cpu"]
    main(["--model", str(folder), "--output", str(output), *common, *flags])
    lines = (output / "samples.jsonl").read_text().splitlines()
    return json.loads((output / "results.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture
def adapter(llava_folder, tmp_path):
    """A LoRA adapter whose products are not 0, on a LLaVA with a CLIP-MoE tower."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPMoEVisionModel(
        CLIPMoEVisionConfig(**sizes, image_size=32, patch_size=16, num_experts=4, num_experts_per_tok=2)
    )
    llama = LlamaForCausalLM.from_pretrained(llava_folder.parent / "llama")
    base = assemble(tower, llama, load_processor(llava_folder).tokenizer, tmp_path / "base")
    chat = load(base, device="cpu")
    add_lora(chat.model, LoraSettings(r=2, alpha=64))
    for name, parameter in chat.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    info = AdapterInfo(str(base), weights_sha256(base), None, "pad", chat.model.config.vision_tower_fingerprint)
    save_adapter(tmp_path / "adapter", chat.model, chat.model.state_dict(), info, chat.processor)
    return tmp_path / "adapter"


def test_an_adapter_on_a_moe_tower_answers_as_the_merged_model(adapter, pope_folder, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    joined, answers = _run(adapter, pope_folder, tmp_path / "a", "--batch-size", "4")
    merged, expected = _run(tmp_path / "merged", pope_folder, tmp_path / "b", "--batch-size", "4")
    assert [line["answer"] for line in answers] == [line["answer"] for line in expected]
    assert joined["result"]["pope_scenes"]["metrics"] == merged["result"]["pope_scenes"]["metrics"]
    assert joined["model"]["tower"] == merged["model"]["tower"] == "clip_moe_vision_model"
    # The adapter's own weights do not tell on what it stands.
    base = read_info(adapter).base
    assert joined["model"]["base"] == {"path": base, "weights_sha256": weights_sha256(Path(base))}
    # What the base alone says is something else, and none of its answers are taken for the adapter's.
    _, plain = _run(base, pope_folder, tmp_path / "a", "--batch-size", "4")
    assert [line["answer"] for line in plain] != [line["answer"] for line in answers]


def test_a_quantised_model_is_asked_anew_and_the_record_says_so(llava_folder, pope_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    _run(llava_folder, pope_folder, tmp_path)
    record, answers = _run(llava_folder, pope_folder, tmp_path, "--quantization", "4bit")
    assert record["settings"]["quantization"] == "4bit"
    assert record["result"]["pope_scenes"]["cost"]["asked"] == 6
    chat = load(llava_folder, device="cpu", quantization="4bit")
    image = Image.open(pope_folder / "images" / answers[0]["doc"]["image_source"])
    messages = [{"role": "user", "content": f"<image>\n{answers[0]['prompt']}"}]
    assert answers[0]["answer"] == chat.generate(messages, [image], max_new_tokens=4)


@pytest.mark.slow
def test_lmms_evals_own_command_gives_the_same_numbers(llava_folder, pope_folder, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "vision_moe_llava", "--tasks", "pope_scenes"]
    command += ["--model_args", f"pretrained={llava_folder},max_new_tokens=4", "--device", "cpu", "--batch_size", "8"]
    command += ["--include_path", str(CHECKOUT / "eval" / "tasks"), "--output_path", str(tmp_path / "theirs")]
    command += ["--log_samples"]
    environment = {**os.environ, "VISION_MOE_SCENES": str(pope_folder)}
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=900)
    record, answers = _run(llava_folder, pope_folder, tmp_path / "ours")
    # Its exit code says nothing, so the files must.
    (results,) = tmp_path.rglob("*_results.json")
    theirs = json.loads(results.read_text())["results"]["pope_scenes"]
    for name, value in record["result"]["pope_scenes"]["metrics"].items():
        assert theirs[f"{name},none"] == value, name
    (samples,) = tmp_path.rglob("*_samples_pope_scenes.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {line["doc_id"]: line["filtered_resps"] for line in logged} == {
        line["doc_id"]: line["answer"] for line in answers
    }


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_go_on_from_its_answers(llava_folder, pope_folder, tmp_path):
    _, answers = _run(llava_folder, pope_folder, tmp_path / "one", "--batch-size", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval.run"]
    command += ["--model", str(llava_folder), "--tasks", "pope_scenes", "--data", str(pope_folder), "--batch-size", "1"]
    command += ["--max-new-tokens", "4", "--device", "cpu", "--limit", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def two(output):
        subprocess.run([*command, "--output", str(output)], env=environment, check=True, cwd=CHECKOUT, timeout=900)
        lines = (output / "samples.jsonl").read_text().splitlines()
        return json.loads((output / "results.json").read_text()), [json.loads(line) for line in lines]

    # Five questions, so that one of the ranks is asked one of them twice.
    found, lines = two(tmp_path / "two")
    assert [(line["doc_id"], line["answer"]) for line in lines] == [(i, answers[i]["answer"]) for i in range(5)]
    assert found["result"]["pope_scenes"]["n"] == 5
    assert sum(len(file.read_text().splitlines()) for file in (tmp_path / "two" / "answers").iterdir()) == 5
    # What one process was answered, two do not ask again.
    found, lines = two(tmp_path / "one")
    assert found["result"]["pope_scenes"]["cost"]["asked"] == 0
    assert [line["answer"] for line in lines] == [line["answer"] for line in answers[:5]]
