"""A tiny CLIP-MoE."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel


@pytest.fixture
def make_moe(clip_sizes: dict[str, Any]) -> Callable[..., CLIPMoEModel]:
    """Makes a tiny CLIP-MoE in evaluation mode; the fields go to both towers."""

    def make(seed: int = 0, **fields: Any) -> CLIPMoEModel:
        sizes = copy.deepcopy(clip_sizes)
        for tower in ("vision_config", "text_config"):
            sizes[tower].update(fields)
        torch.manual_seed(seed)
        model = CLIPMoEModel(CLIPMoEConfig(**sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make
