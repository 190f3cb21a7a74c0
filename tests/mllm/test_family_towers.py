"""Image towers other than CLIP's inside a LLaVA: which hidden state it sees, how many tokens, folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from mllm.assemble import build_llava, save
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.tower import load_tower, resolve_tower
from vision_moe.convert.open_clip import to_open_clip
from vision_moe.model import (
    Dinov2MoEConfig,
    Dinov2MoEModel,
    Siglip2MoEVisionConfig,
    Siglip2MoEVisionModel,
    SiglipMoEConfig,
    SiglipMoEModel,
    ViTMoEConfig,
    ViTMoEModel,
)

_SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 9}
_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config={**_SIZE, "intermediate_size": 48}, text_config=_TEXT)),
    "siglip_moe": lambda: SiglipMoEModel(
        SiglipMoEConfig(vision_config={**_SIZE, "intermediate_size": 48}, text_config=_TEXT)
    ),
    "vit": lambda: ViTModel(ViTConfig(**_SIZE, intermediate_size=48)),
    "vit_moe": lambda: ViTMoEModel(ViTMoEConfig(**_SIZE, intermediate_size=48, moe_layers=[1, 2])),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SIZE, mlp_ratio=2)),
    "dinov2_moe": lambda: Dinov2MoEModel(Dinov2MoEConfig(**_SIZE, mlp_ratio=2)),
}


@pytest.fixture(params=list(_MODELS))
def source(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A whole SigLIP, or an image tower, of 3 layers and 4 x 4 patches."""
    torch.manual_seed(3)
    return _MODELS[request.param]().eval()


def test_a_tower_ends_at_the_selected_hidden_state(source: PreTrainedModel, tmp_path: Path) -> None:
    source.save_pretrained(tmp_path)
    whole = getattr(source, "vision_model", source)
    pixel_values = torch.randn(2, 3, 32, 32)
    for given in (source, tmp_path):
        tower = load_tower(given, -2, torch.float32).eval()
        assert tower.config.num_hidden_layers == 2
        with torch.no_grad():
            expected = whole(pixel_values, output_hidden_states=True).hidden_states[-2]
            assert torch.equal(tower(pixel_values, output_hidden_states=True).hidden_states[-1], expected)


def test_a_llava_sees_one_token_for_each_patch(
    source: PreTrainedModel,
    tiny_llm: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    picture: Image.Image,
    tmp_path: Path,
) -> None:
    model, processor = build_llava(source, tiny_llm, tiny_tokenizer)
    inputs = processor(images=picture, text="<image> What is it?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    output = model.train()(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    has_experts = bool(getattr(model.config.vision_config, "moe_block_indices", ()))
    assert (output.aux_loss is not None) == has_experts
    if has_experts:
        routers = [p for name, p in model.model.vision_tower.named_parameters() if name.endswith("router.weight")]
        assert routers
        assert all(router.grad.abs().max() > 0 for router in routers)
    save(model, processor, tmp_path / "llava")
    again = LlavaMoEForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


def test_an_open_clip_folder_is_a_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 24, "bos_token_id": 38, "eos_token_id": 39}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)).eval()
    folder = tmp_path / "open_clip"
    folder.mkdir()
    save_file(to_open_clip(clip), folder / "open_clip_model.safetensors")
    model = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    tower = load_tower(resolve_tower(str(folder), tmp_path / "converted"), -1, torch.float32)
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = clip.vision_model(pixel_values).last_hidden_state
    torch.testing.assert_close(tower(pixel_values).last_hidden_state, expected)
    # A second run takes what is there.
    (folder / "open_clip_model.safetensors").unlink()
    assert resolve_tower(str(folder), tmp_path / "converted") == str(tmp_path / "converted")


def test_a_hub_name_of_a_tower_is_left_to_from_pretrained(tmp_path: Path) -> None:
    assert resolve_tower("openai/clip-vit-base-patch32", tmp_path / "converted") == "openai/clip-vit-base-patch32"


def test_a_tower_that_is_no_folder_and_no_hub_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder no/such/folder/here"):
        resolve_tower("no/such/folder/here", tmp_path / "converted")


def test_a_tower_of_pictures_of_any_shape_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {name: value for name, value in _SIZE.items() if name != "image_size"}
    tower = Siglip2MoEVisionModel(Siglip2MoEVisionConfig(**fields, intermediate_size=48, num_patches=16))
    with pytest.raises(ValueError, match="use a SigLIP 2 of fixed resolution"):
        load_tower(tower, -2, torch.float32)
