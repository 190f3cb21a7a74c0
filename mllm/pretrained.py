"""Loads what `mllm.assemble` and `mllm.train` wrote: the model, whole or in few bits, and its processor."""

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mllm.model import LlavaMoEForConditionalGeneration

Quantization = Literal["4bit", "8bit"]


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
) -> LlavaMoEForConditionalGeneration:
    """Loads a saved LLaVA; arguments as in `mllm.generate.load`.

    Raises:
        ValueError: an unknown quantization, or the folder lacks weights.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, report = LlavaMoEForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype or "auto",
        device_map={"": device},
        quantization_config=_quantization_config(quantization),
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder} is no complete model; missing: {sorted(report['missing_keys'])}")
    return model


def load_processor(folder: str | Path) -> LlavaProcessor:
    """The saved processor, with the image processing of training, which AutoProcessor would swap for torchvision's."""
    settings, _ = LlavaProcessor.get_processor_dict(str(folder))
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "chat_template")
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        **{name: settings[name] for name in names if name in settings},
    )


def _quantization_config(quantization: str | None) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    # Full names: "vision_tower" alone would match nothing, and the tower would be quantised unnoticed.
    spared = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=spared,
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    raise ValueError(f"unknown quantization {quantization!r}; choose one of: 4bit, 8bit")
