"""CLIPMoEModel: parity with transformers' CLIP, aux loss, padding, checkpointing, precision, files."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel
from vision_moe.moe.losses import load_balance_loss
from vision_moe.upcycle import upcycle

ALL_LOSSES = {
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.25,
    "router_importance_loss_coef": 0.125,
    "router_local_entropy_loss_coef": 0.3,
    "router_global_entropy_loss_coef": 0.7,
}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_dense_checkpoint_maps_by_name_onto_a_model_without_moe_blocks(make_moe, make_dense_clip, clip_batch):
    dense, moe = make_dense_clip(3), make_moe(moe_layers=[])
    moe.load_state_dict(dense.state_dict())
    expected, actual = dense(**clip_batch, return_loss=True), moe(**clip_batch, return_loss=True)
    for name in ("loss", "logits_per_image", "image_embeds", "text_embeds"):
        assert torch.equal(actual[name], expected[name])


def test_legacy_end_token_pools_the_highest_token_id_as_clip_does(make_dense_clip, clip_batch):
    dense = make_dense_clip(0)
    dense.config.text_config.eos_token_id = dense.text_model.eos_token_id = 2
    moe = upcycle(dense)
    expected = dense.text_model(clip_batch["input_ids"], clip_batch["attention_mask"]).pooler_output
    actual = moe.text_model(clip_batch["input_ids"], clip_batch["attention_mask"]).pooler_output
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_weight_layout_is_the_experts_interface(make_moe):
    state = make_moe(moe_layers=[1]).state_dict()
    mlp = {
        n.split(".mlp.")[1]: tuple(t.shape)
        for n, t in state.items()
        if n.startswith("vision_model.encoder.layers.1.mlp")
    }
    assert mlp == {
        "router.weight": (4, 32),
        "experts.up_proj": (4, 48, 32),
        "experts.up_proj_bias": (4, 48),
        "experts.down_proj": (4, 32, 48),
        "experts.down_proj_bias": (4, 32),
    }
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in state


@pytest.mark.parametrize("auto", [True, False], ids=["AutoModel", "CLIPMoEModel"])
def test_save_and_load_give_the_same_model_bit_for_bit(make_moe, clip_batch, tmp_path, auto):
    moe = make_moe(router_z_loss_coef=0.5)
    moe.save_pretrained(tmp_path)
    again = (AutoModel if auto else CLIPMoEModel).from_pretrained(tmp_path)
    assert type(again) is CLIPMoEModel
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in moe.state_dict().items())
    expected, actual = (m(**clip_batch, return_loss=True, output_router_logits=True) for m in (moe, again))
    assert torch.equal(actual.logits_per_image, expected.logits_per_image)
    assert torch.equal(actual.loss, expected.loss)
    assert AutoConfig.from_pretrained(tmp_path).vision_config.router_z_loss_coef == 0.5


def test_loading_rebuilds_buffers_that_are_not_saved(make_moe, tmp_path):
    """Models are built on the meta device; only _init_weights gives such a buffer its values."""
    make_moe().save_pretrained(tmp_path)
    again = CLIPMoEModel.from_pretrained(tmp_path)
    buffers = dict(again.named_buffers())
    assert buffers
    assert not buffers.keys() & again.state_dict().keys()
    for buffer in buffers.values():
        assert torch.equal(buffer, torch.arange(buffer.shape[-1])[None])


@pytest.mark.parametrize("tower_class", [CLIPMoEVisionModel, CLIPMoETextModel])
def test_a_tower_loads_from_the_folder_of_the_whole_model_and_from_its_own(make_moe, tmp_path, tower_class):
    moe = make_moe()
    moe.save_pretrained(tmp_path / "whole")
    tower, info = tower_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    source = moe.vision_model if tower_class is CLIPMoEVisionModel else moe.text_model
    tower.save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower")
    assert type(again) is tower_class
    for loaded in (tower, again):
        assert loaded.state_dict().keys() == source.state_dict().keys()
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_experts_and_routers_are_initialized_like_the_mlp_they_replace(clip_sizes):
    """Freshly built and built on the meta device: CLIP's own standard deviations, no memory left as it was found."""
    sizes = copy.deepcopy(clip_sizes)
    sizes["vision_config"].update(hidden_size=64, intermediate_size=256)
    model = CLIPMoEModel(CLIPMoEConfig(**sizes))
    mlp = model.vision_model.encoder.layers[0].mlp
    assert mlp.router.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert mlp.experts.up_proj.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert mlp.experts.down_proj.std().item() == pytest.approx(64**-0.5 * 4**-0.5, rel=0.05)
    assert mlp.experts.up_proj_bias.abs().max() == mlp.experts.down_proj_bias.abs().max() == 0


def test_router_logits_list_the_image_towers_blocks_then_the_text_towers(make_moe, clip_batch):
    moe = make_moe(moe_layers=[1])
    out = moe(**clip_batch, output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(3, 17, 4), (3, 12, 4)]
    assert torch.equal(out.router_logits[0], out.vision_model_output.router_logits[0])
    hidden = []
    moe.text_model.encoder.layers[1].layer_norm2.register_forward_hook(lambda m, a, output: hidden.append(output))
    moe(**clip_batch)
    logits_BSE = hidden[0] @ moe.text_model.encoder.layers[1].mlp.router.weight.T
    valid_BS = clip_batch["attention_mask"].bool()
    torch.testing.assert_close(out.router_logits[1][valid_BS], logits_BSE[valid_BS])


def test_aux_loss_is_the_mean_of_the_blocks_of_both_towers_without_padding(make_moe, clip_batch):
    """CLIP-MoE, eq. 9, with 2 image and 1 text blocks, so that a mean of tower means would differ."""
    moe = make_moe(router_aux_loss_coef=0.5)
    moe.config.text_config.moe_layers = [1]
    moe = CLIPMoEModel(moe.config).eval()
    out = moe(**clip_batch, output_router_logits=True)
    valid_BS = clip_batch["attention_mask"].bool()
    blocks = [logits.flatten(0, 1) for logits in out.router_logits[:2]] + [out.router_logits[2][valid_BS]]
    losses = [load_balance_loss(b.softmax(-1), b.argmax(-1, keepdim=True)) for b in blocks]
    assert len(losses) == 3
    torch.testing.assert_close(out.aux_loss, 0.5 * sum(losses) / 3)
    assert out.aux_loss.dtype == torch.float32


def test_aux_loss_comes_in_training_or_with_router_logits(make_moe, clip_batch):
    moe = make_moe()
    assert moe(**clip_batch).aux_loss is None
    assert moe(**clip_batch).router_logits is None
    assert moe(**clip_batch, output_router_logits=True).aux_loss is not None
    assert moe.vision_model(clip_batch["pixel_values"], output_router_logits=True).aux_loss is not None
    trained = moe.train()(**clip_batch)
    assert trained.aux_loss is not None
    assert trained.router_logits is None


def test_aux_loss_follows_the_config(make_moe, clip_batch):
    moe = make_moe(output_router_logits=True)
    assert len(moe(**clip_batch).router_logits) == 4
    before = moe(**clip_batch).aux_loss
    for tower in (moe.config.vision_config, moe.config.text_config):
        tower.router_aux_loss_coef *= 2
    torch.testing.assert_close(moe(**clip_batch).aux_loss, 2 * before)


def test_dense_model_has_a_zero_aux_loss(make_moe, clip_batch):
    assert make_moe(moe_layers=[]).train()(**clip_batch).aux_loss.item() == 0.0


def test_loss_is_the_contrastive_loss_plus_the_aux_loss(make_moe, clip_batch):
    moe = make_moe()
    plain = moe(**clip_batch, return_loss=True)
    both = moe(**clip_batch, return_loss=True, output_router_logits=True)
    logits, targets = plain.logits_per_text, torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(plain.loss, (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2)
    torch.testing.assert_close(both.loss, plain.loss + both.aux_loss)


def test_load_loss_needs_noise_and_is_applied_in_training(make_moe, clip_batch):
    with pytest.raises(Exception, match="router_load_loss_coef needs noisy routing"):
        make_moe(router_load_loss_coef=1.0)
    moe = make_moe(router_load_loss_coef=1.0, router_aux_loss_coef=0.0, router_noise_std=1.0)
    assert moe(**clip_batch, output_router_logits=True).aux_loss.item() == 0.0
    assert moe.train()(**clip_batch).aux_loss.item() > 0.0


def test_padding_content_and_length_change_nothing(make_moe, clip_batch):
    moe = make_moe(**ALL_LOSSES)
    ids, mask = clip_batch["input_ids"][1:], clip_batch["attention_mask"][1:]
    expected = moe.text_model(ids, mask, output_router_logits=True)
    for other_ids, other_mask in [
        (torch.where(mask.bool(), ids, 41), mask),
        (ids[:, :7], mask[:, :7]),
    ]:
        actual = moe.text_model(other_ids, other_mask, output_router_logits=True)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss)


def test_padding_never_reaches_the_experts(make_moe, clip_batch):
    moe, rows = make_moe(), []
    for layer in moe.text_model.encoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    moe.text_model(clip_batch["input_ids"], clip_batch["attention_mask"])
    assert rows == [12 + 7 + 4] * 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["no noise", "noise"])
def test_gradient_checkpointing_changes_neither_aux_loss_nor_gradients(make_moe, clip_batch, use_reentrant, noise):
    losses, grads, logits = [], [], []
    for checkpointing in (False, True):
        moe = make_moe(**ALL_LOSSES, router_noise_std=noise).train()
        if checkpointing:
            moe.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            moe.vision_model.embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_())
        torch.manual_seed(5)
        out = moe(**clip_batch, return_loss=True, output_router_logits=True)
        out.loss.backward()
        losses.append((out.loss.item(), out.aux_loss.item()))
        grads.append(gradients(moe))
        logits.append(out.router_logits)
    assert losses[0] == losses[1]
    assert len(logits[0]) == len(logits[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_gets_a_gradient_in_training(make_moe, clip_batch):
    moe = make_moe().train()
    moe(**clip_batch, return_loss=True).loss.backward()
    assert [name for name, parameter in moe.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("implementation", ["default", "eager", "grouped_mm"])
def test_bfloat16_autocast_training_step_is_close_to_float32(make_moe, clip_batch, implementation):
    results = []
    for enabled in (False, True):
        moe = make_moe(**ALL_LOSSES).train()
        if implementation != "default":
            moe.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = moe(**clip_batch, return_loss=True, output_router_logits=True)
        out.loss.backward()
        assert out.aux_loss.dtype == out.router_logits[0].dtype == torch.float32
        results.append((out.loss.item(), torch.cat([grad.flatten() for grad in gradients(moe).values()])))
    (loss, grad), (autocast_loss, autocast_grad) = results
    assert autocast_loss == pytest.approx(loss, rel=0.02)
    # A token near a tie may take another expert in bfloat16, so the bound is on the whole gradient.
    assert (autocast_grad - grad).norm() < 0.1 * grad.norm()


def test_a_bfloat16_model_runs_forward_and_backward(make_moe, clip_batch):
    moe = make_moe().to(torch.bfloat16).train()
    out = moe(**clip_batch, return_loss=True)
    out.loss.backward()
    assert out.image_embeds.dtype == torch.bfloat16
    assert out.aux_loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


def test_experts_implementation_is_ours_by_default_and_can_be_set(make_moe, clip_batch, tmp_path):
    moe = make_moe()
    implementations = dict.fromkeys(("", "vision_config", "text_config"), "vision_moe")
    assert moe.get_experts_implementation() == implementations
    expected = moe(**clip_batch).logits_per_image
    moe.save_pretrained(tmp_path)
    for name in ("eager", "grouped_mm", "batched_mm"):
        moe.set_experts_implementation(name)
        assert moe.get_experts_implementation() == dict.fromkeys(implementations, name)
        torch.testing.assert_close(moe(**clip_batch).logits_per_image, expected)
        loaded = CLIPMoEModel.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.get_experts_implementation() == dict.fromkeys(implementations, name)


@pytest.mark.parametrize(
    ("requested", "kept"), [(True, [0, 1, 2]), (-2, [1]), ([0, -1], [0, 2]), (0, []), ([0], [0]), (False, [])], ids=str
)
def test_hidden_states_are_selected_as_llava_does(make_moe, clip_batch, requested, kept):
    """An int or list keeps those states and None elsewhere; 0 is falsy, transformers' rule, so it needs a list."""
    tower, pixels = make_moe().vision_model, clip_batch["pixel_values"]
    everything = tower(pixels, output_hidden_states=True).hidden_states
    states = tower(pixels, output_hidden_states=requested).hidden_states or ()
    assert [i for i, state in enumerate(states) if state is not None] == kept
    assert all(torch.equal(states[i], everything[i]) for i in kept)
    assert torch.equal(everything[-1], tower(pixels).last_hidden_state)


def test_tower_without_pre_layernorm_feeds_its_embeddings_to_the_first_block(clip_sizes, clip_batch):
    config = CLIPMoEConfig(**clip_sizes).vision_config
    config.pre_layernorm = False
    tower = CLIPMoEVisionModel(config).eval()
    assert not [name for name in tower.state_dict() if "pre_layrnorm" in name]
    states = tower(clip_batch["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], tower.embeddings(clip_batch["pixel_values"]))


def test_tuple_outputs_and_feature_methods_work_as_in_clip(make_moe, clip_batch):
    moe = make_moe()
    out = moe(**clip_batch)
    assert torch.equal(moe(**clip_batch, return_dict=False)[0], out.logits_per_image)
    text = moe.get_text_features(clip_batch["input_ids"], clip_batch["attention_mask"]).pooler_output
    image = moe.get_image_features(clip_batch["pixel_values"]).pooler_output
    torch.testing.assert_close(text / text.norm(dim=-1, keepdim=True), out.text_embeds)
    torch.testing.assert_close(image / image.norm(dim=-1, keepdim=True), out.image_embeds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 with num_experts=4"),
        ({"moe_layers": [0, 2]}, r"in \[0, num_hidden_layers=2\), but got \[0, 2\]"),
        ({"moe_layers": [1, 1]}, "moe_layers must be distinct"),
        ({"router_global_entropy_min_experts": 9}, r"in \[1, num_experts=4\], but got 9"),
    ],
)
def test_impossible_configs_are_refused(make_moe, fields, message):
    with pytest.raises(Exception, match=message):
        make_moe(**fields)
