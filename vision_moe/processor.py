"""The processor of a dual encoder's folder."""

from pathlib import Path

import transformers
from transformers import AutoConfig, ProcessorMixin

import vision_moe.model  # noqa: F401  # registers the model types
from vision_moe.model.families import encoder_family


def load_processor(folder: str | Path) -> ProcessorMixin:
    """Loads by the class that the families' table names, so that folders that do not name one load as well.

    Args:
        folder: folder or hub name of a dual encoder.

    Raises:
        ValueError: the model is of no family that vision_moe knows.
    """
    family = encoder_family(AutoConfig.from_pretrained(folder))
    return getattr(transformers, family.processor).from_pretrained(folder)
