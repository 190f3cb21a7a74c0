"""Two processes do what one does: losses and all their gradients, of mixtures too, data check, features, streams,
checkpoints, router biases."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModel

from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data import open_captions
from vision_moe.features import extract_features
from vision_moe.model import LIMoEConfig, LIMoEModel
from vision_moe.moe.losses import AuxLossWeights, aux_loss
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.upcycle import upcycle

# Functions of means over tokens, whose means over two halves are not those over the whole.
LOSSES = {"router_importance_loss_coef": 0.5, "router_global_entropy_loss_coef": 0.5, "router_z_loss_coef": 0.5}
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
        "input_ids": torch.tensor([[1, 4, 7, 3], [1, 5, 9, 3], [1, 8, 3, 0], [1, 3, 0, 0]]),
        # Eight tokens of captions on rank 0 and five on rank 1.
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        # Of a router: three tokens on rank 0, and on rank 1 eight, one of which is padding.
        "logits": 2 * torch.randn(11, 4, generator=generator),
        "noise": 0.5 * torch.randn(11, 4, generator=generator),
        "valid": torch.arange(11) != 5,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_shard):
    """A folder with a shard that has a broken picture, and one for a stream: four shards of three pictures each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("shards", "stream"):
        (folder / name).mkdir()
    samples = {f"k{i}": {"captions": [f"red {i}", "blue square"]} for i in range(9)}
    write_shard(folder / "shards" / "train-0000.tar", samples, broken=("k4",))
    for shard in range(4):
        samples = {f"s{shard}{i}": {"captions": [("red", "blue", "square")[i]]} for i in range(3)}
        write_shard(folder / "stream" / f"train-{shard:04d}.tar", samples)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_processor, make_tiny_clip):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_clip().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "router_std": 1.0, **LOSSES}
    upcycle(make_tiny_clip(), **fields).save_pretrained(folder / "clip_moe")
    upcycle(make_tiny_clip(), **fields, local_router_losses=True).save_pretrained(folder / "local")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    inputs = {"image_size": 32, "patch_size": 16, "vocab_size": 12, "max_position_embeddings": 8, "projection_dim": 16}
    limoe = LIMoEModel(LIMoEConfig(**sizes, **inputs, **LOSSES, moe_layers=[1], initializer_factor=3.0))
    limoe.save_pretrained(folder / "limoe")
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
        assert [process.wait(timeout=900) for process in ranks] == [0, 0]
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
        torch.testing.assert_close(found["cached-dense-contrastive"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in clip.named_parameters():
            torch.testing.assert_close(found[f"cached-dense-{name}"], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_ranks_gather_in_order(results):
    assert [found["ranks"].tolist() for found in results] == [[0, 1], [0, 1]]


def test_ranks_go_on_from_the_same_checkpoint(results):
    assert [found["checkpoint_step"].tolist() for found in results] == [[2], [2]]


def test_both_ranks_hold_the_features_that_one_process_extracts(
    results, shards, make_tiny_clip, tiny_processor, tmp_path
):
    dataset = open_captions(shards / "shards", max_unreadable_share=0.5)
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


def test_router_losses_are_those_of_the_tokens_of_all_ranks(inputs, results):
    for name in ("load_balance", "z", "importance", "load", "local_entropy", "global_entropy"):
        logits_TE = inputs["logits"].clone().requires_grad_()
        noisy_TE = logits_TE + inputs["noise"]
        weights = AuxLossWeights(**{name: 1.0})
        loss = aux_loss(logits_TE, noisy_TE, inputs["valid"], top_k=2, noise_std=0.5, weights=weights)
        loss.backward()
        assert loss > 0.01
        # Each rank's, summed over both losses of the same value: averaged, as DDP averages, they are one process's.
        gradient_TE = torch.cat([found[f"{name}-gradient"] for found in results]) / 2
        assert_equal(name, gradient_TE, logits_TE.grad)
        for found in results:
            assert_equal(name, found[f"{name}-loss"], loss.detach())


def assert_equal(name, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=lambda what: f"{name}: {what}")


@pytest.mark.parametrize("step", ["", "cached-"])
@pytest.mark.parametrize("kind", ["clip_moe", "limoe"])
def test_a_mixtures_losses_and_every_gradient_equal_those_of_one_process(inputs, results, model_folder, kind, step):
    """With a gradient cache too, each rank's two pairs one after the other."""
    model = AutoModel.from_pretrained(model_folder / kind).train()
    outputs = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    loss = contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    (loss + outputs.aux_loss).backward()
    assert outputs.aux_loss > 0.01
    for found in results:
        torch.testing.assert_close(found[f"{step}{kind}-contrastive"], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{step}{kind}-aux"], outputs.aux_loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            assert_equal(name, found[f"{step}{kind}-{name}"], parameter.grad)


def test_local_router_losses_are_those_of_each_ranks_own_tokens(inputs, results, model_folder):
    model = AutoModel.from_pretrained(model_folder / "local").train()
    for number, found in enumerate(results):
        own = slice(number * 2, number * 2 + 2)
        outputs = model(**{name: inputs[name][own] for name in ("input_ids", "attention_mask", "pixel_values")})
        torch.testing.assert_close(found["local-aux"], outputs.aux_loss.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0]["local-aux"], results[1]["local-aux"], rtol=1e-3)


def test_a_stream_gives_each_picture_to_one_rank_and_resumes_on_both(results):
    first, second = (found["unbroken-seen"].tolist() for found in results)
    assert len(first) == len(second) == 6
    # Three steps of 2 x 2 pictures are the one epoch of twelve.
    assert len({*first, *second}) == 12
    for found in results:
        assert torch.equal(found["resumed-seen"], found["unbroken-seen"])
        names = [name.removeprefix("unbroken-") for name in found if name.startswith("unbroken-")]
        assert len(names) > 10
        assert all(torch.equal(found[f"unbroken-{name}"], found[f"resumed-{name}"]) for name in names)
        assert all(torch.equal(found[f"unbroken-{name}"], results[0][f"unbroken-{name}"]) for name in names[1:])
