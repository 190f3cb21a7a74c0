"""The trainer under DeepSpeed on two CPU ranks: same result as one plain process, and kill -9 changes nothing."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from safetensors.torch import load_file
from transformers import AutoModel

import mllm.recipe
from mllm.deepspeed_setup import keep_blocks_whole
from mllm.train import run
from vision_moe.config import write_yaml
from vision_moe.moe.layer import MoEMLP

_TIMEOUT_S = 400


def _launch(config, recipe: Path) -> subprocess.Popen:
    write_yaml(config, recipe)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm.train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with recipe.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _finish(process: subprocess.Popen, recipe: Path) -> None:
    try:
        returncode = process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert returncode == 0, recipe.with_suffix(".log").read_text()[-4000:]


def _kill_when(path: Path, process: subprocess.Popen, recipe: Path) -> None:
    """Kill -9 of the launcher, whose ranks must die with it, as soon as `path` is there."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, recipe.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)
    process.kill()
    process.wait()


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unbroken(make_config, tmp_path):
    """Runs a recipe on two ranks from beginning to end."""

    def start(deepspeed: str, **fields):
        config = make_config(tmp_path / deepspeed, deepspeed=deepspeed, **fields)
        _finish(_launch(config, tmp_path / f"{deepspeed}.yaml"), tmp_path / f"{deepspeed}.yaml")
        return config

    return start


def _assert_killed_run_ends_alike(config, tmp_path: Path) -> None:
    broken = replace(config, output=tmp_path / "broken")
    recipe = tmp_path / "broken.yaml"
    for stage in ("pretrain", "finetune"):
        mark = broken.output / stage / "checkpoints" / "checkpoint-1" / "complete.json"
        _kill_when(mark, _launch(broken, recipe), recipe)
        time.sleep(1)
        assert not (broken.output / stage / "stage.json").exists()
    _finish(_launch(broken, recipe), recipe)
    assert "goes on from" in recipe.with_suffix(".log").read_text()
    assert _files(broken.output) == _files(config.output)
    expected = load_file(config.output / "model" / "model.safetensors")
    got = load_file(broken.output / "model" / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_zero2_on_two_ranks_equals_one_process_and_survives_kill_9_in_each_stage(unbroken, make_config, tmp_path):
    config = unbroken("zero2")
    _assert_equals_one_process(config, make_config, tmp_path)
    _assert_killed_run_ends_alike(config, tmp_path)


def test_zero3_on_two_ranks_equals_one_process(unbroken, make_config, tmp_path):
    """With a tower that trains, whose router losses are those of both ranks' pictures."""
    tuning = {"tower": "full", "tower_lr": 1e-3}
    _assert_equals_one_process(unbroken("zero3", finetune=tuning), make_config, tmp_path, finetune=tuning)
    # Its preflight put the weights together, and took them apart again.
    log = (tmp_path / "zero3.log").read_text()
    assert log.count("preflight: forward and backward are as they must be") >= 2
    assert "left out" not in log


def test_a_block_of_experts_is_fetched_whole(tiny_parts):
    model = AutoModel.from_pretrained(tiny_parts["vision"])
    keep_blocks_whole(model)
    assert {type(module) for module in model.modules() if z3_leaf_module(module)} == {MoEMLP}


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2_offload", "zero3_offload"])
def test_offload_on_two_ranks_equals_one_process(unbroken, make_config, tmp_path, deepspeed):
    _assert_equals_one_process(unbroken(deepspeed), make_config, tmp_path)


@pytest.mark.slow
def test_zero3_survives_kill_9_in_each_stage(unbroken, tmp_path):
    _assert_killed_run_ends_alike(unbroken("zero3"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_zero2_trains_adapters_on_quantised_weights_and_survives_kill_9(unbroken, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    config = unbroken("zero2", finetune={"llm": "lora", "quantization": quantization}, bf16=True)
    before = load_file(config.output / "pretrain" / "model" / "model.safetensors")
    after = load_file(config.output / "model" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert any(not torch.equal(before[name], after[name]) for name in after if "q_proj" in name)
    _assert_killed_run_ends_alike(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llava15_7b_lora", "llava15_7b_qlora"])
def test_published_recipes_with_adapters_run_their_smoke_form(recipe, tmp_path):
    path = Path(mllm.recipe.__file__).parent / "recipes" / f"{recipe}.yaml"
    command = [sys.executable, "-m", "mllm.train", str(path), "--smoke", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, env=environment, check=True, timeout=_TIMEOUT_S)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["frozen", "full", "lora"])
def test_zero3_trains_lora_with_and_without_the_tower_in_bfloat16(unbroken, tower):
    config = unbroken("zero3", finetune={"llm": "lora", "tower": tower}, bf16=True)
    before = load_file(config.output / "pretrain" / "model" / "model.safetensors")
    after = load_file(config.output / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in after if "q_proj" in name)


def _losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def _assert_equals_one_process(config, make_config, tmp_path: Path, **fields) -> None:
    plain = run(make_config(tmp_path / "plain", **fields))
    losses, expected_losses = _losses(config.output), _losses(tmp_path / "plain")
    assert len(losses) == len(expected_losses) == 6
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    expected, got = load_file(plain / "model.safetensors"), load_file(config.output / "model" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        # Adam divides by the gradient's size, so a rounding difference in a tiny gradient grows to a share of a step.
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
