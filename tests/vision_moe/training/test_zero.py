"""DeepSpeed around the stages of an encoder: ZeRO on two ranks trains what one plain process trains."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vision_moe.config import parse
from vision_moe.recipe import TrainConfig
from vision_moe.train import run
from vision_moe.zero import deepspeed_settings, scalars_as_vectors

STAGES = ("dense", "sparse_upcycling", "mcl1", "dmu")


@pytest.fixture
def flags(small_scenes, recipes):
    def of(output, *more):
        recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
        data = ["--data.train", str(small_scenes), "--output", str(output), "--report", "false", "--bf16", "false"]
        few = ["--methods", "[dense,sparse_upcycling,dmu]", "--moe.num_experts", "2", "--mcl.optimizer", "adamw"]
        return [*recipe, *data, *few, *more]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_two_ranks_train_what_one_process_trains(flags, tmp_path, zero):
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vision_moe.train", *flags(tmp_path / zero, "--deepspeed", zero)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run(parse(TrainConfig, flags(tmp_path / "plain")))
    for stage in STAGES:
        found, expected = (load_file(tmp_path / of / stage / "model" / "model.safetensors") for of in (zero, "plain"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float32
            assert found[name].shape == tensor.shape
            # Adam makes whole steps of the rounding of a gradient near 0, so single entries may differ.
            is_other = (found[name] - tensor).abs() > 1e-2 * tensor.abs().max() + 1e-4
            assert is_other.float().mean() <= 0.03, (stage, name)


@pytest.mark.slow
def test_ctrl_c_under_the_launcher_leaves_a_checkpoint_from_which_two_ranks_go_on(flags, tmp_path):
    """The signal goes to the launcher's process group, as a terminal sends it; the weights end as without it."""
    pytest.importorskip("deepspeed")
    checkout = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment |= {"NPROC": "2", "VISION_MOE_PYTHON": sys.executable}

    def command(name):
        more = ["--deepspeed", "zero2", "--methods", "[dense]", "--dense.samples", "512", "--global_batch_size", "8"]
        return ["bash", str(checkout / "scripts" / "launch.sh"), "vision_moe.train", *flags(tmp_path / name, *more)]

    def weights(name):
        return load_file(tmp_path / name / "dense" / "model" / "model.safetensors")

    start = {"cwd": checkout, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command("stopped"), start_new_session=True, **start)
    metrics, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command, started again, goes on from there" in output
    assert not (tmp_path / "stopped" / "dense" / "stage.json").exists()
    assert list((tmp_path / "stopped" / "dense" / "checkpoints").glob("checkpoint-*"))
    for name in ("stopped", "unbroken"):
        done = subprocess.run(command(name), **start)
        assert done.returncode == 0, done.stdout[-3000:]
    found, expected = weights("stopped"), weights("unbroken")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_settings_are_those_of_the_stage_or_of_a_file(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="DeepSpeed needs a launcher, also for one process"):
        deepspeed_settings("zero2", bf16=True)
    monkeypatch.setenv("RANK", "0")
    settings = deepspeed_settings("zero3", bf16=True)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed_settings(str(tmp_path / "own.json"), bf16=False)["zero_optimization"] == {"stage": 1}
    with pytest.raises(FileNotFoundError, match="one of zero1, zero2, zero3 or a JSON file, but got 'zero4'"):
        deepspeed_settings("zero4", bf16=False)


def test_scalars_become_vectors_and_stay_frozen_or_not():
    model = nn.Linear(2, 2)
    model.logit_scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    assert scalars_as_vectors(model) == ["logit_scale"]
    assert model.logit_scale.tolist() == [2.0]
    assert not model.logit_scale.requires_grad
