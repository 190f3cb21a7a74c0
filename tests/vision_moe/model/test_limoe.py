"""LIMoEModel: parity, isolation of the modalities, losses for each, padding, initialization, checkpointing, files."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from vision_moe.model import LIMoEConfig, LIMoEModel
from vision_moe.model.encoder import EncoderOutput

NO_LOSSES = {"image_router_losses": {}, "text_router_losses": {}}


def plain_tower(model, x_BSD):
    """A pre-norm transformer written out: 2 heads, exact GELU, mean of the normed states."""
    for layer in model.encoder.layers:
        attention, B, S = layer.self_attn, *x_BSD.shape[:2]
        h_BSD = layer.layer_norm1(x_BSD)
        q, k, v = (
            nn.functional.linear(h_BSD, p.weight, p.bias).view(B, S, 2, 16).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)
        attended = (weights @ v).transpose(1, 2).reshape(B, S, 32)
        x_BSD = x_BSD + nn.functional.linear(attended, attention.out_proj.weight, attention.out_proj.bias)
        h_BSD = layer.layer_norm2(x_BSD)
        h_BSF = nn.functional.gelu(nn.functional.linear(h_BSD, layer.mlp.fc1.weight, layer.mlp.fc1.bias))
        x_BSD = x_BSD + nn.functional.linear(h_BSF, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
    norm = model.post_layernorm
    return nn.functional.layer_norm(x_BSD, (32,), norm.weight, norm.bias, 1e-6).mean(dim=1)


def test_a_tower_without_experts_equals_a_plain_transformer_for_both_modalities(make_limoe, clip_batch):
    model = make_limoe(moe_layers=[])
    patch = model.vision_embeddings.patch_embedding
    patches_BDHW = nn.functional.conv2d(clip_batch["pixel_values"], patch.weight, patch.bias, stride=8)
    x_BSD = patches_BDHW.flatten(2).transpose(1, 2) + model.vision_embeddings.position_embedding.weight
    image_BD = plain_tower(model, x_BSD) @ model.visual_projection.weight.T
    out = model(**clip_batch)
    torch.testing.assert_close(out.image_embeds, nn.functional.normalize(image_BD), rtol=1e-4, atol=1e-5)
    for row, length in enumerate((12, 7, 4)):
        embeddings = model.text_embeddings
        ids_S = clip_batch["input_ids"][row, :length]
        x_BSD = (embeddings.token_embedding.weight[ids_S] + embeddings.position_embedding.weight[:length])[None]
        text_BD = plain_tower(model, x_BSD) @ model.text_projection.weight.T
        expected = nn.functional.normalize(text_BD)[0]
        torch.testing.assert_close(out.text_embeds[row], expected, rtol=1e-4, atol=1e-5)
    logits = model.logit_scale.exp() * out.image_embeds @ out.text_embeds.T
    torch.testing.assert_close(out.logits_per_image, logits)


def test_captions_do_not_change_pictures_without_a_capacity(make_limoe, clip_batch):
    model = make_limoe()
    other = {**clip_batch, "input_ids": clip_batch["input_ids"].flip(0), "attention_mask": None}
    first, second = model(**clip_batch), model(**other)
    torch.testing.assert_close(first.image_embeds, second.image_embeds, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first.text_embeds, second.text_embeds, atol=1e-2)


def test_captions_take_places_from_pictures_under_a_capacity(make_limoe, clip_batch):
    """Batch priority: the captions' tokens come after the pictures', and still some get places first."""
    model = make_limoe(eval_capacity_factor=0.5, batch_priority=True, output_router_logits=True)
    with torch.no_grad():
        model.encoder.layers[1].mlp.router.weight.mul_(20)
    other = {**clip_batch, "input_ids": clip_batch["input_ids"].flip(1), "attention_mask": None}
    first, second = model(**clip_batch), model(**other)
    dropped = [(o.vision_model_output.dropped_fraction, o.text_model_output.dropped_fraction) for o in (first, second)]
    assert dropped[0] != dropped[1]
    assert not torch.allclose(first.image_embeds, second.image_embeds, atol=1e-4)
    alone = model.get_image_features(clip_batch["pixel_values"])
    assert not torch.allclose(first.vision_model_output.pooler_output, alone.pooler_output, atol=1e-4)


def test_one_call_of_the_experts_sees_the_valid_tokens_of_both_modalities(make_limoe, clip_batch):
    model, rows = make_limoe(moe_layers=None), []
    for layer in model.encoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(**clip_batch)
    assert rows == [3 * 16 + 12 + 7 + 4] * 2


def test_counts_are_those_of_the_modality_s_own_tokens(make_limoe, clip_batch):
    model = make_limoe(output_router_logits=True)
    out = model(**clip_batch)
    valid_BS = clip_batch["attention_mask"].bool()
    assert [tuple(logits.shape) for logits in out.router_logits] == [(3, 16, 4), (3, 12, 4)]
    for side, logits_TE in (
        (out.vision_model_output, out.router_logits[0].flatten(0, 1)),
        (out.text_model_output, out.router_logits[1][valid_BS]),
    ):
        gates_TE = logits_TE.softmax(dim=-1)
        assert side.tokens_per_expert.tolist() == [torch.bincount(logits_TE.argmax(-1), minlength=4).tolist()]
        torch.testing.assert_close(side.mean_gates, gates_TE.mean(dim=0)[None])
        torch.testing.assert_close(side.gate_entropy, torch.special.entr(gates_TE).sum(-1).mean()[None])
        assert side.dropped_fraction.tolist() == [0.0]


def test_router_losses_of_each_modality_are_hand_worked(make_limoe, monkeypatch):
    """Image gates (3/4, 1/4) and (1/2, 1/2), twice; text gates (1/4, 3/4), twice, and a padding token. Over all six
    tokens the gates sum to (3, 3): balanced, so that importance is 0 while text is not balanced.

    Image: mean (5/8, 3/8). Text: entropy of each token and of the mean h = 2 ln 2 - 3/4 ln 3.
    """
    image = {"global_entropy": 2.0, "z": 1.0}
    text = {"local_entropy": 3.0, "global_entropy": 5.0, "global_entropy_min_experts": 1.8}
    fields = {"num_experts": 2, "image_size": 16, "router_importance_loss_coef": 7.0}
    model = make_limoe(**fields, image_router_losses=image, text_router_losses=text)
    a, b, c, padding = [math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(3)], [50.0, -50.0]
    logits_1TE = torch.tensor([[a, b, a, b, c, c, padding]])
    encoded = EncoderOutput(torch.zeros(1, 7, 32), (logits_1TE,), (), torch.zeros(1, 2, 2), torch.zeros(1, 2))
    monkeypatch.setattr(model.encoder, "forward", lambda *args, **kwargs: encoded)
    inputs = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    out = model(**inputs, pixel_values=torch.zeros(1, 3, 16, 16), output_router_logits=True)
    image_global = math.log(2) + 5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(3 / 8)
    image_loss = 2.0 * image_global + 2.5 * math.log(2) ** 2
    h = 2 * math.log(2) - 0.75 * math.log(3)
    text_loss = 3.0 * h + 5.0 * (math.log(1.8) - h)
    assert out.vision_model_output.aux_loss.item() == pytest.approx(image_loss, abs=1e-5)
    assert out.text_model_output.aux_loss.item() == pytest.approx(text_loss, abs=1e-5)
    assert out.aux_loss.item() == pytest.approx(image_loss + text_loss, abs=1e-5)
    model.config.router_z_loss_coef = 1.0
    out = model(**inputs, pixel_values=torch.zeros(1, 3, 16, 16), output_router_logits=True)
    z_of_all = (4 * math.log(4) ** 2 + 2 * math.log(2) ** 2) / 6
    assert out.aux_loss.item() == pytest.approx(image_loss + text_loss + z_of_all, abs=1e-5)


def test_loss_is_the_contrastive_loss_plus_the_aux_loss(make_limoe, clip_batch):
    model = make_limoe()
    plain = model(**clip_batch, return_loss=True)
    both = model(**clip_batch, return_loss=True, output_router_logits=True)
    logits, targets = plain.logits_per_text, torch.arange(3)
    cross_entropy = nn.functional.cross_entropy
    torch.testing.assert_close(plain.loss, (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    assert both.aux_loss.item() > 0.0
    torch.testing.assert_close(both.loss, plain.loss + both.aux_loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_content_and_length_change_nothing(make_limoe, clip_batch, attention):
    model = make_limoe(router_z_loss_coef=1.0, eval_capacity_factor=0.8)
    model.set_attn_implementation(attention)
    pixels, ids, mask = (clip_batch[name][1:] for name in ("pixel_values", "input_ids", "attention_mask"))
    expected = model(ids, pixels, mask, output_router_logits=True)
    for other_ids, other_mask in [(torch.where(mask.bool(), ids, 41), mask), (ids[:, :7], mask[:, :7])]:
        actual = model(other_ids, pixels, other_mask, output_router_logits=True)
        for name in ("text_embeds", "image_embeds", "aux_loss"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_features_of_one_modality_are_those_of_the_joint_pass(make_limoe, clip_batch):
    model = make_limoe()
    out = model(**clip_batch)
    text = model.get_text_features(clip_batch["input_ids"], clip_batch["attention_mask"]).pooler_output
    image = model.get_image_features(clip_batch["pixel_values"]).pooler_output
    torch.testing.assert_close(nn.functional.normalize(text), out.text_embeds)
    torch.testing.assert_close(nn.functional.normalize(image), out.image_embeds)
    assert torch.equal(model(**clip_batch, return_dict=False)[0], out.logits_per_image)
    two = {**clip_batch, "pixel_values": clip_batch["pixel_values"][:2]}
    torch.testing.assert_close(model(**two).logits_per_image, out.logits_per_image[:2])


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForZeroShotImageClassification, LIMoEModel])
def test_save_and_load_give_the_same_model_bit_for_bit(make_limoe, clip_batch, tmp_path, auto):
    model = make_limoe(image_router_losses={"z": 0.5}, batch_priority=True, capacity_factor=1.5)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is LIMoEModel
    for field in ("image_router_losses", "text_router_losses", "batch_priority", "capacity_factor", "moe_layers"):
        assert getattr(again.config, field) == getattr(model.config, field)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    expected, actual = (m(**clip_batch, return_loss=True, output_router_logits=True) for m in (model, again))
    assert torch.equal(actual.logits_per_image, expected.logits_per_image)
    assert torch.equal(actual.loss, expected.loss)


def test_a_model_from_nothing_starts_at_the_documented_deviations():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LIMoEConfig(**sizes, moe_layers=[1], image_size=64, patch_size=8, vocab_size=500, projection_dim=64)
    model = LIMoEModel(config)
    dense, sparse = model.encoder.layers
    expected = {
        model.vision_embeddings.patch_embedding.weight: 0.02,
        model.vision_embeddings.position_embedding.weight: 0.02,
        model.text_embeddings.token_embedding.weight: 0.02,
        model.text_embeddings.position_embedding.weight: 0.02,
        dense.self_attn.q_proj.weight: 128**-0.5 * 4**-0.5,
        sparse.self_attn.k_proj.weight: 128**-0.5 * 4**-0.5,
        sparse.self_attn.v_proj.weight: 128**-0.5 * 4**-0.5,
        dense.self_attn.out_proj.weight: 128**-0.5,
        dense.mlp.fc1.weight: 256**-0.5,
        dense.mlp.fc2.weight: 128**-0.5 * 4**-0.5,
        sparse.mlp.experts.up_proj: 256**-0.5,
        sparse.mlp.experts.down_proj: 128**-0.5 * 4**-0.5,
        sparse.mlp.router.weight: 0.02,
        model.visual_projection.weight: 128**-0.5,
        model.text_projection.weight: 128**-0.5,
    }
    for weight, deviation in expected.items():
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.logit_scale.item() == pytest.approx(2.6592)


def test_every_parameter_gets_a_gradient_in_training(make_limoe, clip_batch):
    model = make_limoe(**NO_LOSSES).train()
    model(**clip_batch, return_loss=True).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    # One choice with the raw gate: the contrastive loss alone trains the router.
    assert model.encoder.layers[1].mlp.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(make_limoe, clip_batch, use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = make_limoe(router_noise_std=1.0, capacity_factor=1.0, batch_priority=True).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        out = model(**clip_batch, return_loss=True)
        out.loss.backward()
        results.append((out.loss, out.aux_loss, *(parameter.grad for parameter in model.parameters())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_hidden_states_and_attentions_are_given_for_each_modality(make_limoe, clip_batch):
    model = make_limoe()
    model.set_attn_implementation("eager")
    out = model(**clip_batch, output_hidden_states=True, output_attentions=True)
    for side, length in ((out.vision_model_output, 16), (out.text_model_output, 12)):
        assert [tuple(state.shape) for state in side.hidden_states] == [(3, length, 32)] * 3
        assert [tuple(weights.shape) for weights in side.attentions] == [(3, 2, length, length)] * 2
    normed = model.post_layernorm(out.text_model_output.hidden_states[-1])
    torch.testing.assert_close(normed, out.text_model_output.last_hidden_state)
    selected = model.get_image_features(clip_batch["pixel_values"], output_hidden_states=[-1]).hidden_states
    assert [state is None for state in selected] == [True, True, False]
    torch.testing.assert_close(selected[-1], out.vision_model_output.hidden_states[-1])


def test_bfloat16_autocast_routes_in_float32(make_limoe, clip_batch):
    model = make_limoe().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**clip_batch, return_loss=True, output_router_logits=True)
    out.loss.backward()
    assert out.aux_loss.dtype == out.router_logits[0].dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_group_size": 1, "capacity_factor": 1.0}, "capacity_group_size must be None"),
        ({"router_bias_update_rate": 0.001}, "router_bias_update_rate must be None"),
        ({"text_router_losses": {"entropy": 1.0}}, "text_router_losses has unknown losses entropy; choose from load_b"),
        ({"image_router_losses": {"load": 1.0}}, "image_router_losses: load needs noisy routing"),
        ({"image_router_losses": {"global_entropy_min_experts": 5}}, r"must be in \[1, num_experts=4\], but got 5"),
        ({"scoring_func": "sigmoid", "text_router_losses": {"z": 1.0}}, "text_router_losses: z are defined for"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads, but got 32 with 3"),
        ({"patch_size": 7}, "image_size must be a multiple of patch_size, but got 32"),
    ],
)
def test_impossible_configurations_are_refused(make_limoe, fields, message):
    with pytest.raises(Exception, match=message):
        make_limoe(**fields)


def test_missing_and_misfit_inputs_are_refused(make_limoe, clip_batch):
    model = make_limoe()
    with pytest.raises(ValueError, match="pixel_values is missing; for one side alone call get_image_features"):
        model(input_ids=clip_batch["input_ids"])
    with pytest.raises(ValueError, match="pictures must be 32 x 32 pixels, but got"):
        model.get_image_features(torch.zeros(1, 3, 64, 64))
    assert model.get_image_features(torch.zeros(1, 3, 64, 64), True).last_hidden_state.shape == (1, 64, 32)
