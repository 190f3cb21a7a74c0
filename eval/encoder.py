"""The dual encoder that a benchmark measures: folder -> model, processor and what identifies them."""

import logging
from typing import Any

import torch
from transformers import AutoModel

import vision_moe.model  # noqa: F401  registers the model types
from vision_moe.assets import find_model
from vision_moe.processor import load_processor

logger = logging.getLogger(__name__)


def load_encoder(name: str, device: str | None = None) -> tuple[Any, Any]:
    """Loads a dual encoder, dense or a mixture, and its processor.

    Args:
        name: a folder written by save_pretrained, a packaged model ("scenes-clip") or a hub id.
        device: torch device; None = cuda if there is one.

    Raises:
        ValueError: if the model is no dual encoder (a vision tower alone has no text side to compare with).
    """
    folder = find_model(name)
    model = AutoModel.from_pretrained(folder)
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(
            f"{name} holds a {type(model).__name__}; this benchmark needs a dual encoder: a CLIPModel, a "
            f"CLIPMoEModel or one of another family (docs/families.md)"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), load_processor(folder)
