"""The processor of a dual encoder's folder."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

import vision_moe.model  # noqa: F401  # registers the model types
from vision_moe.model.families import ENCODER_BY_TYPE


def load_processor(folder: str | Path) -> ProcessorMixin:
    """Loads by the class that the families' table names, so that folders that do not name one load as well.

    Args:
        folder: folder or hub name of a dual encoder; one outside the table names its processor's class itself.
    """
    family = ENCODER_BY_TYPE.get(AutoConfig.from_pretrained(folder).model_type)
    processor_class = AutoProcessor if family is None else getattr(transformers, family.processor)
    return processor_class.from_pretrained(folder)
