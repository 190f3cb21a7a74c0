"""Tiny CLIPs: one with a word tokenizer, for all that takes a processor, and seeded ones with a batch of tensors."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    SiglipConfig,
    VisionTextDualEncoderConfig,
)

from vision_moe.model import LIMoEConfig, LIMoEModel

_WORDS = ["<pad>", "<bos>", "<unk>", "<eos>", "a", "photo", "of", "red", "blue", "square", "one", "two"]
_MAX_TEXT_TOKENS = 8
_TOWER_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}


@pytest.fixture(scope="session")
def tiny_processor() -> CLIPProcessor:
    """32-pixel pictures, at most 8 text tokens: <bos> words <eos>, padded with <pad>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=_MAX_TEXT_TOKENS,
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(image_processor=image_processor, tokenizer=fast)


@pytest.fixture(scope="session")
def make_tiny_clip() -> Callable[[], CLIPModel]:
    """Makes a dense CLIP of 2 + 2 layers and width 32 that fits `tiny_processor`, always with the same weights."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(_WORDS),
        "max_position_embeddings": _MAX_TEXT_TOKENS,
        "bos_token_id": 1,
        # Not 2: for that id transformers looks for the largest id of the caption instead.
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"image_size": 32, "patch_size": 16}

    def make() -> CLIPModel:
        torch.manual_seed(0)
        config = CLIPConfig(vision_config={**tower, **vision}, text_config={**tower, **text}, projection_dim=16)
        return CLIPModel(config).eval()

    return make


@pytest.fixture
def tiny_clip(make_tiny_clip: Callable[[], CLIPModel]) -> CLIPModel:
    """The model of `make_tiny_clip`, one for each test."""
    return make_tiny_clip()


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., None]:
    """Writes a shard of pictures in one color each: {key: {"captions": [...]}}; those of `broken` keys are cut."""

    def write(path: Path, samples: dict[str, dict[str, object]], broken: tuple[str, ...] = ()) -> None:
        with tarfile.open(path, "w") as tar:
            for number, (key, metadata) in enumerate(samples.items()):
                encoded = io.BytesIO()
                Image.new("RGB", (32, 32), (number * 40 % 256, 128, 0)).save(encoded, "JPEG")
                picture = encoded.getvalue()[:100] if key in broken else encoded.getvalue()
                for suffix, content in (("jpg", picture), ("json", json.dumps(metadata).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    return write


@pytest.fixture(scope="session")
def clip_sizes() -> dict[str, Any]:
    """Arguments of a tiny CLIPConfig or CLIPMoEConfig; copy before changing."""
    text = {"vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
    return {
        "vision_config": {**_TOWER_SIZES, "image_size": 32, "patch_size": 8},
        "text_config": {**_TOWER_SIZES, **text},
        "projection_dim": 16,
    }


def shake(model: nn.Module) -> None:
    """Adds noise to every weight, so that nothing stays at 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture
def make_dense_clip(clip_sizes: dict[str, Any]) -> Callable[[int], CLIPModel]:
    """Makes the tiny dense CLIP of a seed, in evaluation mode, with biases and norms away from 0 and 1."""

    def make(seed: int) -> CLIPModel:
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(**clip_sizes)).eval()
        shake(model)
        return model

    return make


@pytest.fixture
def make_limoe() -> Callable[..., LIMoEModel]:
    """Makes a tiny LIMoE for `clip_batch` in evaluation mode, 4 experts in its second block, weights away from 0."""

    def make(seed: int = 0, **fields: Any) -> LIMoEModel:
        text = {"vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
        sizes = {**_TOWER_SIZES, **text, "image_size": 32, "patch_size": 8, "moe_layers": [1]}
        torch.manual_seed(seed)
        model = LIMoEModel(LIMoEConfig(**{**sizes, **fields})).eval()
        shake(model)
        return model

    return make


@pytest.fixture(scope="session")
def clip_batch() -> dict[str, torch.Tensor]:
    """Three pictures and three captions of 12, 7 and 4 tokens, padded with zeros on the right."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 97, (3, 12), generator=generator)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate((12, 7, 4)):
        input_ids[row, length - 1] = 98
        input_ids[row, length:] = 0
        attention_mask[row, :length] = 1
    pixel_values = torch.randn(3, 3, 32, 32, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


_FAMILY_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_FAMILY_IMAGES = {"image_size": 32, "patch_size": 8}
_FAMILY_TEXT = {"vocab_size": 99, "max_position_embeddings": 12, "pad_token_id": 0}
_FAMILY_DINOV2 = {k: v for k, v in _FAMILY_TOWER.items() if k != "intermediate_size"}
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "clip": (
        CLIPConfig,
        {**_FAMILY_TOWER, **_FAMILY_IMAGES},
        {**_FAMILY_TOWER, **_FAMILY_TEXT, "bos_token_id": 97, "eos_token_id": 98},
    ),
    "siglip": (SiglipConfig, {**_FAMILY_TOWER, **_FAMILY_IMAGES}, {**_FAMILY_TOWER, **_FAMILY_TEXT}),
    "siglip2": (
        Siglip2Config,
        {**_FAMILY_TOWER, "patch_size": 8, "num_patches": 16},
        {**_FAMILY_TOWER, **_FAMILY_TEXT},
    ),
    "vit+bert": (
        VisionTextDualEncoderConfig,
        {**_FAMILY_TOWER, **_FAMILY_IMAGES, "model_type": "vit"},
        {**_FAMILY_TOWER, **_FAMILY_TEXT, "model_type": "bert"},
    ),
    "dinov2+roberta": (
        VisionTextDualEncoderConfig,
        {**_FAMILY_DINOV2, **_FAMILY_IMAGES, "mlp_ratio": 2, "layerscale_value": 0.5, "model_type": "dinov2"},
        {**_FAMILY_TOWER, **_FAMILY_TEXT, "max_position_embeddings": 13, "model_type": "roberta"},
    ),
    "clip+xlm-roberta": (
        VisionTextDualEncoderConfig,
        {**_FAMILY_TOWER, **_FAMILY_IMAGES, "model_type": "clip_vision_model"},
        {**_FAMILY_TOWER, **_FAMILY_TEXT, "max_position_embeddings": 13, "model_type": "xlm-roberta"},
    ),
}


@pytest.fixture(params=list(_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Name of a dual encoder's family, with its towers where they are not its own."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_family() -> Callable[..., PreTrainedModel]:
    """make_family(family, seed): transformers' tiny dense model, in evaluation mode, nothing in it at 0 or 1."""

    def make(family: str, seed: int = 0) -> PreTrainedModel:
        config_class, vision, text = _FAMILIES[family]
        torch.manual_seed(seed)
        model = AutoModel.from_config(config_class(vision_config=vision, text_config=text)).eval()
        shake(model)
        return model

    return make


@pytest.fixture(scope="session")
def family_batch(clip_batch: dict[str, torch.Tensor]) -> Callable[[str], dict[str, torch.Tensor]]:
    """family_batch(family): the pictures and captions of `clip_batch` as the family takes them."""

    def batch(family: str) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.clone() for name, tensor in clip_batch.items()}
        if family.startswith("siglip"):
            del inputs["attention_mask"]
        if family == "siglip2":
            # 4 x 4, 3 x 4 and 2 x 3 patches of 3 x 8 x 8 values.
            inputs["pixel_values"] = (
                inputs["pixel_values"].unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).transpose(1, 2)
            )
            inputs["pixel_values"] = inputs["pixel_values"].flatten(2)
            inputs["spatial_shapes"] = torch.tensor([[4, 4], [3, 4], [2, 3]])
            inputs["pixel_attention_mask"] = (torch.arange(16) < inputs["spatial_shapes"].prod(1)[:, None]).long()
        return inputs

    return batch
