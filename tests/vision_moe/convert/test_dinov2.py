"""DINOv2 in CLIP's layout computes what DINOv2 computes."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from vision_moe.convert.dinov2 import read_onnx, to_clip_vision
from vision_moe.model import CLIPMoEVisionModel


@pytest.fixture(scope="module")
def dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14, layerscale_value=0.7
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        # Fresh weights are too regular: zero biases and equal scales would hide a wrong fold.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("image_size", [56, 84])
def test_all_tokens_equal_dinov2(dinov2, image_size):
    pixels = torch.randn(2, 3, image_size, image_size)
    clip = to_clip_vision(dinov2, image_size)
    with torch.no_grad():
        expected = dinov2(pixels).last_hidden_state
        found = clip.post_layernorm(clip(pixels).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fewer_blocks_are_the_hidden_state_of_that_depth(dinov2):
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = dinov2(pixels, output_hidden_states=True).hidden_states[2]
        found = to_clip_vision(dinov2, 56, num_layers=2)(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_tower_survives_saving(dinov2, tmp_path):
    clip = to_clip_vision(dinov2, 56)
    clip.save_pretrained(tmp_path)
    again = CLIPMoEVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(clip(pixels).last_hidden_state, again(pixels).last_hidden_state)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(dinov2):
    with pytest.raises(ValueError, match="multiple of the patch size 14, but got 100"):
        to_clip_vision(dinov2, 100)


def test_onnx_export_gives_the_same_model(dinov2, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    # Names and shapes as the exporter of transformers 4 leaves them.
    old_names = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }
    tensors, nodes = {}, []
    for name, value in dinov2.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif value.ndim == 2 and name.endswith(".weight"):
            anonymous = f"onnx::MatMul_{len(nodes)}"
            tensors[anonymous] = value.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            node = onnx.helper.make_node("MatMul", ["x", anonymous], ["y"], name=f"/backbone/{path}/MatMul")
            nodes.append(node)
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = value
    arrays = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=arrays)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    again = read_onnx(tmp_path / "m.onnx", dinov2.config)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, dinov2(pixels).last_hidden_state)
