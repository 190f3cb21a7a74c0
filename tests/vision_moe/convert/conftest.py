"""Models with the widths that OpenAI's names allow."""

from collections.abc import Callable
from typing import Any

import pytest

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel


@pytest.fixture
def make_official_like() -> Callable[..., CLIPMoEModel]:
    """Makes a CLIP-MoE with heads of 64; the fields go to both towers."""

    def make(**fields: Any) -> CLIPMoEModel:
        tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, **fields}
        text = {**tower, "vocab_size": 40, "max_position_embeddings": 24, "bos_token_id": 38, "eos_token_id": 39}
        vision = {**tower, "image_size": 16, "patch_size": 8}
        return CLIPMoEModel(CLIPMoEConfig(vision_config=vision, text_config=text, projection_dim=32)).eval()

    return make
