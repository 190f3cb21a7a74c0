"""Two processes do what one does: loss and all its gradients, data check, features, checkpoints, router biases."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data import open_captions
from vision_moe.features import extract_features
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.upcycle import upcycle

WORKER = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "image_tower": torch.randn(6, 5, generator=generator),
        "text_tower": torch.randn(7, 5, generator=generator),
        "logit_scale": torch.tensor(2.0),
        "images": torch.randn(8, 6, generator=generator),
        "texts": torch.randn(8, 7, generator=generator),
        # A group within a rank, one across ranks, and one pair alone.
        "groups": torch.tensor([0, 0, 1, 1, 1, 1, 1, 5]),
        "input_ids": torch.tensor([[1, 4, 7, 3], [1, 5, 9, 3], [1, 8, 8, 3], [1, 10, 6, 3]]),
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_shard):
    folder = tmp_path_factory.mktemp("shards")
    samples = {f"k{i}": {"captions": [f"red {i}", "blue square"]} for i in range(9)}
    write_shard(folder / "train-0000.tar", samples, broken=("k4",))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_processor, make_tiny_clip):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_clip().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(inputs, shards, model_folder, tmp_path_factory):
    """What each rank found."""
    out = tmp_path_factory.mktemp("two_ranks")
    save_file(inputs, out / "inputs.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(WORKER), str(shards), str(out), str(model_folder)]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # CPU only: on a machine with a GPU accelerate would put both ranks on it.
    world |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("grouping", ["plain", "groups"])
def test_loss_and_every_gradient_equal_those_of_one_process(inputs, results, grouping, label_smoothing, tile):
    names = ("image_tower", "text_tower", "logit_scale")
    image_tower, text_tower, logit_scale = parameters = [inputs[name].clone().requires_grad_() for name in names]
    loss = contrastive_loss(
        normalize(inputs["images"] @ image_tower, dim=-1),
        normalize(inputs["texts"] @ text_tower, dim=-1),
        logit_scale.exp(),
        groups_B=inputs["groups"] if grouping == "groups" else None,
        label_smoothing=label_smoothing,
    )
    loss.backward()
    for found in results:
        prefix = f"{grouping}-{label_smoothing}-{tile}"
        torch.testing.assert_close(found[f"{prefix}-loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in zip(names, parameters, strict=True):
            torch.testing.assert_close(found[f"{prefix}-{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grouping", ["plain", "groups"])
def test_the_sigmoid_loss_and_every_gradient_equal_those_of_one_process(inputs, results, grouping):
    names = ("image_tower", "text_tower", "logit_scale")
    image_tower, text_tower, logit_scale = parameters = [inputs[name].clone().requires_grad_() for name in names]
    loss = sigmoid_loss(
        normalize(inputs["images"] @ image_tower, dim=-1),
        normalize(inputs["texts"] @ text_tower, dim=-1),
        logit_scale.exp(),
        torch.tensor([-3.0]),
        groups_B=inputs["groups"] if grouping == "groups" else None,
    )
    loss.backward()
    for found in results:
        prefix = f"sigmoid-{grouping}"
        torch.testing.assert_close(found[f"{prefix}-loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in zip(names, parameters, strict=True):
            torch.testing.assert_close(found[f"{prefix}-{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_cache_on_two_ranks_gives_the_gradients_of_one_plain_step(inputs, results, make_tiny_clip):
    clip = make_tiny_clip()
    outputs = clip(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    loss = contrastive_loss(outputs.image_embeds, outputs.text_embeds, clip.logit_scale.exp())
    loss.backward()
    for found in results:
        torch.testing.assert_close(found["cached-loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in clip.named_parameters():
            torch.testing.assert_close(found[f"cached-{name}"], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_ranks_gather_in_order(results):
    assert [found["ranks"].tolist() for found in results] == [[0, 1], [0, 1]]


def test_ranks_go_on_from_the_same_checkpoint(results):
    assert [found["checkpoint_step"].tolist() for found in results] == [[2], [2]]


def test_both_ranks_hold_the_features_that_one_process_extracts(
    results, shards, make_tiny_clip, tiny_processor, tmp_path
):
    dataset = open_captions(shards, max_unreadable_share=0.5)
    alone = extract_features(
        make_tiny_clip(), dataset, tiny_processor, cache_dir=tmp_path, batch_size=2, chunk_size=3, fingerprint="x"
    )
    assert len(alone.image_ND) == 8
    for found in results:
        torch.testing.assert_close(found["image"], alone.image_ND)
        torch.testing.assert_close(found["text"], alone.text_ND)


def test_router_biases_follow_the_counts_of_all_ranks(inputs, results, make_tiny_clip):
    fields = {"router_std": 1.0, "router_bias_update_rate": 0.01, "router_bias_update": "z_score"}
    moe = upcycle(make_tiny_clip(), **fields).train()
    callback = RouterBiasCallback()
    callback.on_train_begin(None, None, None, model=moe)
    moe(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    callback.on_optimizer_step(None, None, None)
    expected = {name: tensor for name, tensor in moe.state_dict().items() if name.endswith("choice_bias")}
    assert len(expected) == 4
    for found in results:
        assert all(torch.equal(found[name], bias_E) for name, bias_E in expected.items())
