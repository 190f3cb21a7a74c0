"""Loads what `mllm.assemble` and `mllm.train` wrote: the model, whole or in few bits, and its processor."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mllm.adapter import attach, find_base, is_adapter
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.quantization import Quantization, quantization_config
from vision_moe.assets import find_model


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
) -> LlavaMoEForConditionalGeneration:
    """Loads a saved LLaVA, or an adapter together with its base model; arguments as in `mllm.generate.load`.

    Raises:
        FileNotFoundError: there is no such folder, or an adapter's base model is not where it was.
        ValueError: an unknown quantization, the folder lacks weights, or an adapter's base model has changed.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, report = LlavaMoEForConditionalGeneration.from_pretrained(
        find_base(Path(folder)) if is_adapter(folder) else find_model(str(folder)),
        dtype=dtype or "auto",
        device_map={"": device},
        quantization_config=None if quantization is None else quantization_config(quantization),
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder} is no complete model; missing: {sorted(report['missing_keys'])}")
    return attach(model, Path(folder)) if is_adapter(folder) else model


def load_processor(folder: str | Path) -> LlavaProcessor:
    """The saved processor, with the image processing of training, which AutoProcessor would swap for torchvision's."""
    settings, _ = LlavaProcessor.get_processor_dict(str(folder))
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "chat_template")
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        **{name: settings[name] for name in names if name in settings},
    )
