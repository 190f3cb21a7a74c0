"""Gradient cache: the losses and gradients of a batch in chunks are those of the whole batch."""

import pytest
import torch

from vision_moe.config import parse
from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.grad_cache import cached_step, split_batch
from vision_moe.recipe import TrainConfig
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.trainer import ContrastiveTrainer, training_arguments
from vision_moe.upcycle import upcycle


def info_nce(image_BD, text_BD, scale):
    return contrastive_loss(image_BD, text_BD, scale.exp())


def pairwise(image_BD, text_BD, scale, bias):
    return sigmoid_loss(image_BD, text_BD, scale.exp(), bias)


def temperature(model):
    return [p for name, p in model.named_parameters() if name in ("logit_scale", "logit_bias")]


def cached(model, batch, size, loss=info_nce):
    """Contrastive loss, aux loss and every gradient with a cache."""
    model.zero_grad()
    losses = cached_step(model, split_batch(batch, size), loss, temperature(model), lambda outputs: None)
    return *losses, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "loss_fn"), [("clip", info_nce), ("siglip", pairwise)])
def test_a_dense_models_loss_and_gradients_are_those_of_the_plain_step(make_family, family_batch, kind, loss_fn, size):
    model = make_family(kind).train()
    outputs = model(**family_batch(kind))
    loss = loss_fn(outputs.image_embeds, outputs.text_embeds, *temperature(model))
    loss.backward()
    expected = gradients(model)
    got_loss, aux_loss, got = cached(model, family_batch(kind), size, loss_fn)
    torch.testing.assert_close(got_loss, loss.detach())
    assert aux_loss is None
    assert_equal_gradients(got, expected)


def test_what_is_frozen_gets_no_gradient(make_family, family_batch):
    model = make_family("clip").train()
    model.logit_scale.requires_grad_(False)
    model.vision_model.requires_grad_(False)
    _, _, got = cached(model, family_batch("clip"), 2)
    assert set(got) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_dropless_mixture_without_router_losses_is_as_exact(make_family, family_batch):
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "router_std": 1.0, "router_aux_loss_coef": 0.0}
    model = upcycle(make_family("clip"), **fields).train()
    outputs = model(**family_batch("clip"))
    loss = info_nce(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
    loss.backward()
    expected = gradients(model)
    got_loss, aux_loss, got = cached(model, family_batch("clip"), 2)
    torch.testing.assert_close(got_loss, loss.detach())
    assert aux_loss.item() == 0.0
    assert_equal_gradients(got, expected)


ALL_LOSSES = {
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.1,
    "router_importance_loss_coef": 0.1,
}


@pytest.fixture(params=["two towers", "one tower with entropy losses"])
def make_mixture(request, make_family, make_limoe):
    """Makes a mixture with router losses, in training mode."""

    def make(**fields):
        if request.param == "two towers":
            return upcycle(make_family("clip"), num_experts=4, num_experts_per_tok=2, router_std=1.0, **fields).train()
        entropies = {"router_local_entropy_loss_coef": 0.1, "router_global_entropy_loss_coef": 0.1}
        return make_limoe(**entropies, **fields).train()

    return make


@pytest.mark.parametrize("size", [1, 2, 3])
def test_router_losses_are_those_of_the_whole_batch_with_all_gradients(make_mixture, family_batch, size):
    """Their means over tokens are taken over all chunks, however unequal, before any product or square."""
    model = make_mixture(**ALL_LOSSES)
    outputs = model(**family_batch("clip"))
    loss = info_nce(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
    (loss + outputs.aux_loss).backward()
    expected = gradients(model)
    got_loss, got_aux, got = cached(model, family_batch("clip"), size)
    assert outputs.aux_loss > 0.1
    torch.testing.assert_close(got_loss, loss.detach())
    torch.testing.assert_close(got_aux, outputs.aux_loss.detach())
    assert_equal_gradients(got, expected)


def test_random_numbers_are_replayed_and_go_on_as_after_one_forward_of_each_chunk(make_family, family_batch):
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "router_std": 1.0, "router_aux_loss_coef": 0.0}
    model = upcycle(make_family("clip"), router_noise_std=2.0, **fields).train()
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            layer.self_attn.dropout = 0.2
    chunks = split_batch(family_batch("clip"), 2)
    assert [len(chunk["input_ids"]) for chunk in chunks] == [2, 1]
    torch.manual_seed(1)
    outputs = [model(**chunk) for chunk in chunks]
    image, text = (torch.cat([getattr(output, name) for output in outputs]) for name in ("image_embeds", "text_embeds"))
    info_nce(image, text, model.logit_scale).backward()
    expected, drawn = gradients(model), torch.rand(1)
    torch.manual_seed(1)
    _, _, got = cached(model, family_batch("clip"), 2)
    assert torch.equal(torch.rand(1), drawn)
    assert_equal_gradients(got, expected)


def test_one_chunk_is_the_plain_step_with_noise_and_load_loss(make_mixture, family_batch):
    model = make_mixture(router_noise_std=2.0, router_load_loss_coef=0.1, **ALL_LOSSES)
    torch.manual_seed(1)
    outputs = model(**family_batch("clip"))
    loss = info_nce(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
    (loss + outputs.aux_loss).backward()
    expected = gradients(model)
    torch.manual_seed(1)
    _, got_aux, got = cached(model, family_batch("clip"), 3)
    torch.testing.assert_close(got_aux, outputs.aux_loss.detach())
    assert_equal_gradients(got, expected)


def test_loss_free_balancing_counts_each_token_once(make_family, family_batch):
    model = upcycle(make_family("clip"), num_experts=4, num_experts_per_tok=2, router_bias_update_rate=0.1).train()
    callback = RouterBiasCallback()
    callback.on_train_begin(None, None, None, model=model)
    cached(model, family_batch("clip"), 2)
    # Three pictures of 16 patches and a class token; captions of 12, 7 and 4 tokens; two choices each.
    counted = {tower.config.model_type: counts.sum(dim=1).tolist() for tower, counts in callback._counts_LE.items()}
    assert counted == {"clip_moe_vision_model": [102, 102], "clip_moe_text_model": [46, 46]}


@pytest.fixture
def make_trainer(make_family, tmp_path):
    """Makes the trainer of a tiny CLIP whose first two pairs are of one cluster."""

    def make(**options):
        config = parse(TrainConfig, ["--output", str(tmp_path), "--data.train", "x", "--bf16", "false"])
        return ContrastiveTrainer(
            model=make_family("clip").train(),
            args=training_arguments(config, config.dense, tmp_path, 1),
            label_smoothing=0.1,
            groups_N=torch.tensor([7, 0, 0, 1]),
            **options,
        )

    return make


@pytest.mark.parametrize("tile", [None, 2])
def test_the_trainers_step_is_the_plain_one_with_groups_and_smoothing(make_trainer, family_batch, tile):
    batch = {**family_batch("clip"), "index": torch.tensor([1, 2, 3])}
    plain, chunked = make_trainer(), make_trainer(grad_cache_batch_size=2, loss_tile=tile)
    loss = plain.compute_loss(plain.model, dict(batch))
    loss.backward()
    got_loss = chunked.training_step(chunked.model, dict(batch))
    torch.testing.assert_close(got_loss, loss.detach())
    assert_equal_gradients(gradients(chunked.model), gradients(plain.model))


def test_the_trainer_hands_its_tile_to_the_loss(make_trainer, family_batch):
    trainer = make_trainer(loss_tile=-1)
    with pytest.raises(ValueError, match="tile must be positive"):
        trainer.compute_loss(trainer.model, {**family_batch("clip"), "index": torch.tensor([1, 2, 3])})
