"""What a converted CLIP needs beside its weights: OpenAI's tokenizer and the image processor, as transformers' own."""

from collections.abc import Mapping
from typing import Any

from transformers import CLIPImageProcessor, CLIPTokenizer

# Size of OpenAI's byte-pair vocabulary.
OPENAI_VOCAB = 49_408
_START, _END = "<|startoftext|>", "<|endoftext|>"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def openai_tokenizer(context_length: int) -> CLIPTokenizer:
    """OpenAI's CLIP tokenizer, from the vocabulary that the package open_clip_torch brings.

    Its ids are those of open_clip's own on clean text; open_clip also mends broken Unicode (ftfy) and HTML entities.

    Args:
        context_length: tokens per caption, special ones included; longer captions are cut with `truncation=True`.

    Raises:
        ImportError: open_clip is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError(
            'OpenAI\'s vocabulary comes with the package open_clip: pip install "vision-moe[open_clip]"'
        ) from error
    source = SimpleTokenizer()
    special = {source.sot_token_id: _START, source.eot_token_id: _END}
    vocab = {special.get(number, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(source.bpe_ranks), model_max_length=context_length)


def image_processor(image_size: int, preprocess: Mapping[str, Any] | None = None) -> CLIPImageProcessor:
    """CLIP's image processor: shortest edge to `image_size`, bicubic, center crop, OpenAI's mean and deviation.

    Args:
        image_size: pixels per side.
        preprocess: "preprocess_cfg" of an open_clip folder, which may say otherwise.

    Raises:
        ValueError: open_clip's settings have no counterpart.
    """
    settings = dict(preprocess or {})
    fields: dict[str, Any] = {"crop_size": {"height": image_size, "width": image_size}}
    mode, interpolation = settings.pop("resize_mode", "shortest"), settings.pop("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise ValueError(
            f"resize_mode must be shortest or squash, and interpolation bilinear or bicubic, but got {mode!r} and "
            f"{interpolation!r}"
        )
    if mode == "squash":
        fields |= {"size": fields["crop_size"], "do_center_crop": False}
    else:
        fields["size"] = {"shortest_edge": image_size}
    for theirs, ours in (("mean", "image_mean"), ("std", "image_std")):
        if settings.get(theirs) is not None:
            fields[ours] = list(settings[theirs])
    return CLIPImageProcessor(**fields, resample=_RESAMPLE[interpolation])


def resized(processor: CLIPImageProcessor, image_size: int) -> CLIPImageProcessor:
    """The same image processor for another picture size, in pixels per side."""
    fields = processor.to_dict()
    for name in ("size", "crop_size"):
        fields[name] = {side: image_size for side, pixels in dict(fields[name]).items() if pixels is not None}
    return CLIPImageProcessor.from_dict(fields)
