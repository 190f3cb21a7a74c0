"""Pictures as LLaVA-1.5 sees them: read, cut or padded to a square, normalised."""

import struct
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

AspectRatio = Literal["square", "pad"]


def build_image_processor(
    vision_config: PreTrainedConfig, aspect_ratio: AspectRatio, source: str | Path | None = None
) -> LlavaImageProcessorPil:
    """An image processor for a tower.

    Args:
        vision_config: the tower's; its `image_size` (pixels) is the size of the square.
        aspect_ratio: "square" resizes the shorter edge and cuts the center out (LLaVA's pretraining); "pad" first
            fills the picture up to a square with the mean color (its fine-tuning), so that nothing is lost.
        source: folder or hub name whose processor's mean, standard deviation and resampling are kept; None = CLIP's.

    Raises:
        ValueError: an unknown aspect ratio.
    """
    kept: dict[str, Any] = {}
    if source is not None:
        config, _ = ImageProcessingMixin.get_image_processor_dict(str(source))
        kept = {name: config[name] for name in ("image_mean", "image_std", "resample") if name in config}
    size = vision_config.image_size
    processor = LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **kept)
    set_aspect_ratio(processor, aspect_ratio)
    return processor


def set_aspect_ratio(processor: LlavaImageProcessorPil, aspect_ratio: AspectRatio) -> None:
    """Switches a processor between "square" and "pad"; the model's config must be told as well."""
    if aspect_ratio not in get_args(AspectRatio):
        raise ValueError(f"unknown image_aspect_ratio {aspect_ratio!r}; choose one of: square, pad")
    processor.do_pad = aspect_ratio == "pad"


def pixels(processor: LlavaImageProcessorPil, image: Image.Image) -> Tensor:
    """float32[3, H, W] of one picture."""
    return torch.as_tensor(processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0])


def read_image(path: Path) -> Image.Image:
    """Reads and decodes a whole picture as RGB.

    Raises:
        ValueError: the file is missing or is no picture that PIL can decode.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        # Pillow's plugins raise all of these for damaged files.
        raise ValueError(f"cannot read the picture {path}: {type(error).__name__}: {error}") from error
