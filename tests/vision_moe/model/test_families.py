"""Every family of the table: parity with the dense parent, files, padding, gradients, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, BertConfig, Dinov2Config

from vision_moe.freeze import set_trainable
from vision_moe.kernels.linear import Linear
from vision_moe.model import (
    BertMoEConfig,
    BertMoEModel,
    Dinov2MoEConfig,
    Dinov2MoEModel,
    RobertaMoEConfig,
    Siglip2MoEVisionModel,
    SiglipMoETextModel,
    SiglipMoEVisionConfig,
    SiglipMoEVisionModel,
    ViTMoEConfig,
    ViTMoEModel,
)
from vision_moe.model.families import ENCODER_FAMILIES, encoder_family, max_text_tokens, tower_family
from vision_moe.moe.experts import Experts
from vision_moe.moe.layer import MoEMLP
from vision_moe.moe.losses import load_balance_loss
from vision_moe.upcycle import expert_as_dense, merge_donors, upcycle

LOSSES = {"router_z_loss_coef": 0.25, "router_importance_loss_coef": 0.125}


def donors_of(make_family, family):
    """Two models that differ from the family's seed 0 in the MLPs of their blocks only."""
    models = [make_family(family) for _ in range(2)]
    torch.manual_seed(1)
    for model in models:
        set_trainable(model, "ffn")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return models


def route_all_to(moe, expert):
    """Makes every token choose one expert; its gate is 1, for there is one choice."""
    for module in moe.modules():
        if isinstance(module, MoEMLP):
            module.router.choice_bias.fill_(-9.0)[expert] = 9.0


def assert_same_features(actual, expected):
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_dense_layers_of_the_blocks_take_the_measured_products(make_family, family):
    moe = upcycle(make_family(family))
    for tower in (moe.vision_model, moe.text_model):
        blocks = tower.get_submodule(tower_family(tower.config).blocks)
        assert {type(module) for module in blocks.modules() if isinstance(module, nn.Linear)} == {Linear}


def test_a_model_built_from_nothing_starts_as_its_dense_family_does(make_family, family):
    dense = make_family(family)
    config = upcycle(dense, layers=[1]).config
    starts = []
    for build in (lambda: type(dense)(dense.config), lambda: MODEL_MAPPING[type(config)](config)):
        torch.manual_seed(0)
        # Several, since the spread of few values tells little.
        models = [build().state_dict() for _ in range(4)]
        starts.append({name: torch.stack([model[name].float() for model in models]) for name in models[0]})
    expected, actual = starts
    shared = [name for name in expected.keys() & actual.keys() if expected[name].numel() >= 1024]
    assert any("q_proj" in name or "query" in name for name in shared)
    for name in shared:
        assert actual[name].std().item() == pytest.approx(expected[name].std().item(), rel=0.15, abs=1e-6), name


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_an_upcycled_model_computes_what_its_parent_does(make_family, family_batch, family, layers):
    dense, batch = make_family(family), family_batch(family)
    moe = upcycle(dense, layers=layers, router_std=3.0)
    assert moe.config.model_type == encoder_family(dense.config).moe
    assert sum(isinstance(module, MoEMLP) for module in moe.modules()) == (4 if layers == "all" else 2)
    with torch.no_grad():
        expected, actual = dense(**batch), moe(**batch)
    assert_same_features(actual, expected)
    # As it was given, and through the calls of evaluation.
    texts = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        text = moe.get_text_features(**texts).pooler_output
    torch.testing.assert_close(text / text.norm(dim=-1, keepdim=True), expected.text_embeds, rtol=1e-5, atol=1e-5)


def test_narrow_and_shared_experts_keep_the_parents_function(make_family, family_batch, family):
    dense, batch = make_family(family), family_batch(family)
    for fields in ({"expert_width_factor": 0.5}, {"shared_expert": True}):
        with torch.no_grad():
            assert_same_features(upcycle(dense, router_std=1.0, **fields)(**batch), dense(**batch))


def test_a_merged_model_is_each_donor_where_all_tokens_take_its_expert(make_family, family_batch, family):
    base, donors, batch = make_family(family), donors_of(make_family, family), family_batch(family)
    merged = merge_donors(base, donors, num_experts_per_tok=1)
    # The same model with a bias on the choice, by which all tokens can be sent to one expert.
    config = merged.config
    for tower in (config.vision_config, config.text_config):
        tower.router_bias_update_rate = 0.001
    moe = type(merged)(config).eval()
    assert not moe.load_state_dict(merged.state_dict(), strict=False).unexpected_keys
    for expert, source in enumerate((base, *donors)):
        route_all_to(moe, expert)
        with torch.no_grad():
            assert_same_features(moe(**batch), source(**batch))
    assert not torch.allclose(donors[0](**batch).text_embeds, base(**batch).text_embeds, atol=1e-3)


def test_an_expert_comes_out_as_the_familys_dense_model(make_family, family_batch, family):
    base, donors, batch = make_family(family), donors_of(make_family, family), family_batch(family)
    moe = merge_donors(base, donors)
    for expert, source in enumerate((base, *donors)):
        dense = expert_as_dense(moe, expert)
        assert type(dense) is type(source)
        assert dense.state_dict().keys() == source.state_dict().keys()
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in dense.state_dict().items())
        with torch.no_grad():
            assert_same_features(dense(**batch), source(**batch))
    for tower in ("vision_config", "text_config"):
        ours, theirs = (getattr(model.config, tower).to_dict() for model in (dense, base))
        assert {**ours, "dtype": None} == {**theirs, "dtype": None}


def test_folders_give_the_same_model_back(make_family, family_batch, family, tmp_path):
    moe, batch = upcycle(make_family(family), num_experts=3, layers=[1], router_std=1.0), family_batch(family)
    moe.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(moe)
    assert again.config.text_config.moe_layers == [1]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in moe.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits_per_image, moe(**batch).logits_per_image)
    assert again.vision_model.config is again.config.vision_config
    assert again.get_experts_implementation()[""] == "vision_moe"


def test_router_logits_and_aux_loss_are_those_of_the_valid_tokens(make_family, family_batch, family):
    moe, batch = upcycle(make_family(family), router_std=1.0, router_aux_loss_coef=0.5), family_batch(family)
    assert moe(**batch).aux_loss is None
    output = moe(**batch, output_router_logits=True, return_loss=True)
    sequence = 16 if family.startswith("siglip") else 17
    assert [logits.shape for logits in output.router_logits] == [(3, sequence, 4)] * 2 + [(3, 12, 4)] * 2
    masks = [batch.get("pixel_attention_mask")] * 2 + [batch.get("attention_mask")] * 2
    tokens = [
        logits.flatten(0, 1) if mask is None else logits[mask.bool()]
        for logits, mask in zip(output.router_logits, masks, strict=True)
    ]
    losses = [load_balance_loss(block.softmax(-1), block.argmax(-1, keepdim=True)) for block in tokens]
    torch.testing.assert_close(output.aux_loss, 0.5 * torch.stack(losses).mean())
    torch.testing.assert_close(output.loss, moe(**batch, return_loss=True).loss + output.aux_loss)
    counts = output.text_model_output.tokens_per_expert
    assert counts.sum(dim=1).tolist() == [2 * (36 if family.startswith("siglip") else 12 + 7 + 4)] * 2


def test_padding_never_reaches_the_experts(make_family, family_batch, family):
    moe, rows = upcycle(make_family(family)), []
    for tower in (moe.vision_model, moe.text_model):
        for module in tower.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    moe(**family_batch(family))
    patches = {"siglip": 3 * 16, "siglip2": 16 + 12 + 6}.get(family, 3 * 17)
    assert rows == [patches] * 2 + [36 if family.startswith("siglip") else 12 + 7 + 4] * 2


def test_checkpointing_changes_neither_losses_nor_gradients(make_family, family_batch, family):
    batch, found = family_batch(family), []
    for checkpointing in (False, True):
        moe = upcycle(make_family(family), router_std=1.0, **LOSSES).train()
        if checkpointing:
            moe.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        output = moe(**batch, return_loss=True, output_router_logits=True)
        counts = output.vision_model_output.tokens_per_expert.clone()
        output.loss.backward()
        assert torch.equal(counts, output.vision_model_output.tokens_per_expert)
        found.append((output.loss, output.aux_loss, {n: p.grad for n, p in moe.named_parameters()}))
    (loss, aux, grads), (again, aux_again, grads_again) = found
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(aux_again, aux)
    assert {n for n, grad in grads.items() if grad is None} == {n for n, grad in grads_again.items() if grad is None}
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grads_again[name], grad, rtol=1e-4, atol=1e-6)


def test_every_parameter_that_trains_gets_a_gradient(make_family, family_batch, family):
    """With the sigmoid loss's logit_bias; DINOv2's mask token is the one that no forward reaches."""
    moe = upcycle(make_family(family)).train()
    set_trainable(moe, "all")
    moe(**family_batch(family), return_loss=True).loss.backward()
    without = {name for name, parameter in moe.named_parameters() if parameter.grad is None}
    assert without == ({"vision_model.embeddings.mask_token"} if family.startswith("dinov2") else set())
    assert without == {name for name, parameter in moe.named_parameters() if not parameter.requires_grad}


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_routers_gradients(make_family, family_batch):
    moe = upcycle(make_family("vit+bert")).train()
    moe.activation_checkpointing_enable({"use_reentrant": True})
    moe.vision_model.embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_())
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        moe(**family_batch("vit+bert"))


def test_hidden_states_are_the_dense_towers(make_family, family_batch, family):
    dense, batch = make_family(family), family_batch(family)
    moe = upcycle(dense, router_std=1.0)
    images = {name: batch[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes") if name in batch}
    with torch.no_grad():
        expected = dense.vision_model(**images, output_hidden_states=True).hidden_states
        actual = moe.vision_model(**images, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    valid = batch.get("pixel_attention_mask", torch.ones(actual[0].shape[:2])).bool()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=1e-5)


def test_tuples_and_positional_arguments_work_as_in_the_dense_model(make_family, family_batch, family):
    moe, batch = upcycle(make_family(family)), family_batch(family)
    with torch.no_grad():
        output = moe(**batch)
        assert torch.equal(moe(**batch, return_dict=False)[0], output.logits_per_image)
        masked = [batch["attention_mask"]] if "attention_mask" in batch else []
        positional = moe.text_model(batch["input_ids"], *masked)
        assert torch.equal(positional.last_hidden_state, output.text_model_output.last_hidden_state)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_siglip_tower_loads_from_the_folder_of_the_whole_model(make_family, family, tmp_path):
    moe = upcycle(make_family(family))
    moe.save_pretrained(tmp_path)
    for tower_class, source in ((type(moe.vision_model), moe.vision_model), (type(moe.text_model), moe.text_model)):
        tower, info = tower_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in source.state_dict().items())
    assert isinstance(moe.vision_model, SiglipMoEVisionModel | Siglip2MoEVisionModel)
    assert isinstance(moe.text_model, SiglipMoETextModel) or family == "siglip2"


def test_new_experts_have_the_spread_of_the_familys_own_mlp():
    """Built in place, and where from_pretrained finds no experts in a dense folder."""
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "image_size": 32, "patch_size": 16}
    for config, tower_class, std in (
        (ViTMoEConfig(**size, intermediate_size=128), ViTMoEModel, 0.02),
        (Dinov2MoEConfig(**size, mlp_ratio=2), Dinov2MoEModel, 0.02),
        (SiglipMoEVisionConfig(**size, intermediate_size=128), SiglipMoEVisionModel, (2 / 192) ** 0.5),
    ):
        built = tower_class(config)
        state = {name: tensor for name, tensor in built.state_dict().items() if "experts" not in name}
        loaded = tower_class.from_pretrained(None, config=config, state_dict=state)
        for tower in (built, loaded):
            experts = next(module for module in tower.modules() if isinstance(module, Experts))
            assert experts.up_proj.std().item() == pytest.approx(std, rel=0.05)
            assert experts.down_proj.std().item() == pytest.approx(std, rel=0.05)
            assert not experts.up_proj_bias.any()


def test_blocks_that_are_not_what_the_table_says_are_refused():
    with pytest.raises(ValueError, match="dinov2 needs use_swiglu_ffn=False, but got use_swiglu_ffn=True"):
        Dinov2MoEModel(Dinov2MoEConfig(use_swiglu_ffn=True, num_hidden_layers=1))
    with pytest.raises(ValueError, match="bert needs chunk_size_feed_forward=0, but got chunk_size_feed_forward=4"):
        BertMoEModel(BertMoEConfig(chunk_size_feed_forward=4, num_hidden_layers=1))


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'bert' is no dual encoder that vision_moe knows; the known ones are clip, "):
        encoder_family(BertConfig())
    assert tower_family(Dinov2Config()).moe == "dinov2_moe"
    assert len({name for family in ENCODER_FAMILIES for name in (family.dense, family.moe)}) == 8


def test_robertas_positions_start_behind_the_padding():
    assert max_text_tokens(BertConfig()) == 512
    assert max_text_tokens(RobertaMoEConfig(max_position_embeddings=514, pad_token_id=1)) == 512
