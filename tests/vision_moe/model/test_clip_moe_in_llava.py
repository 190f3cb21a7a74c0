"""LlavaForConditionalGeneration takes a CLIP-MoE tower as its vision_config, with no fork."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel

IMAGE_TOKEN = 60


@pytest.fixture(params=[-2, [-2, -1]], ids=str)
def llava(request):
    vision = CLIPMoEVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=request.param,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 50, (2, 24), generator=generator)
    input_ids[:, 2:18] = IMAGE_TOKEN
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def test_trains_through_the_tower_up_to_the_selected_layer(llava, batch):
    out = llava.train()(**batch, labels=batch["input_ids"])
    out.loss.backward()
    layers = llava.model.vision_tower.encoder.layers
    assert layers[0].mlp.experts.up_proj.grad.abs().max() > 0
    assert layers[0].mlp.router.weight.grad.abs().max() > 0
    uses_last_layer = llava.config.vision_feature_layer != -2
    assert (layers[1].mlp.router.weight.grad is not None) == uses_last_layer


def test_takes_the_towers_hidden_states_without_the_class_token(llava, batch):
    states = llava.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    layers = llava.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    features = torch.cat([states[layer][:, 1:] for layer in layers], dim=-1)
    expected = llava.model.multi_modal_projector(features)
    actual = torch.stack(list(llava.model.get_image_features(batch["pixel_values"]).pooler_output))
    assert torch.equal(actual, expected)


def test_router_logits_come_through_the_image_features(llava, batch):
    out = llava.model.get_image_features(batch["pixel_values"], output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(2, 17, 4)] * 2
    assert out.aux_loss.item() > 0


def test_saves_and_reloads_bit_for_bit(llava, batch, tmp_path):
    llava.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again.model.vision_tower) is CLIPMoEVisionModel
    assert llava.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in llava.state_dict().items())
    assert torch.equal(again(**batch).logits, llava(**batch).logits)


def test_experts_run_on_the_fast_default_inside_llava(llava):
    assert llava.model.vision_tower.config._experts_implementation == "vision_moe"
    llava.set_experts_implementation({"vision_config": "grouped_mm"})
    assert llava.model.vision_tower.config._experts_implementation == "grouped_mm"
