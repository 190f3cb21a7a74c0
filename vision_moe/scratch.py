"""A small dense CLIP with its own tokenizer, for data sets and machines without a pretrained one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel
from vision_moe.recipe import ScratchConfig

_START, _END = "<|startoftext|>", "<|endoftext|>"
_PAD = "<|pad|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_text_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE with CLIP's start and end tokens, trained on `captions`.

    The pad token is its own, unlike CLIP's, so that the end token is found without a special case. The end token must
    not have id 2: transformers takes that for a mistake of old configs and reads captions up to their highest id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_START, _END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    start, end = tokenizer.token_to_id(_START), tokenizer.token_to_id(_END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=max_text_tokens,
    )


def build_clip(config: ScratchConfig, captions: Iterable[str], seed: int) -> tuple[CLIPModel, CLIPProcessor]:
    """A dense CLIP and its processor: random weights, but for the image tower where a pretrained one is given.

    Args:
        config: sizes, or the image tower.
        captions: text that the tokenizer is trained on.
        seed: of the random weights.
    """
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_text_tokens)
    text_config = {
        **_tower(config),
        "num_hidden_layers": config.num_text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_text_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    set_seed(seed)
    if config.vision_tower is not None:
        return _with_tower(config.vision_tower, text_config, tokenizer, config.projection_dim)
    vision_config = {
        **_tower(config),
        "num_hidden_layers": config.num_vision_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    model = CLIPModel(
        CLIPConfig(vision_config=vision_config, text_config=text_config, projection_dim=config.projection_dim)
    )
    if config.positions == "sincos2d":
        with torch.no_grad():
            model.vision_model.embeddings.position_embedding.weight[1:] = sincos_positions(
                config.image_size // config.patch_size, config.hidden_size
            )
    return model, _processor(config, tokenizer)


def build_processor(config: ScratchConfig, captions: Iterable[str]) -> CLIPProcessor:
    """The processor of `build_clip` alone, its tokenizer trained on the captions."""
    return _processor(config, train_tokenizer(captions, config.vocab_size, config.max_text_tokens))


def sincos_positions(side: int, dim: int) -> Tensor:
    """Position embeddings of a square grid from sines and cosines of both coordinates (Beyer et al. 2022, sincos2d).

    CLIP's own start, normal with standard deviation 0.02, is drowned by the patches' content, and a short training
    learns much later where things are (docs/log.md).

    Args:
        side: patches per side.
        dim: width, a multiple of 4.

    Returns:
        float32[side * side, dim], row by row.

    Raises:
        ValueError: if the width is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the width must be a multiple of 4, but got {dim}")
    frequencies_Q = 10_000.0 ** -torch.linspace(0, 1, dim // 4)
    angles_SQ = torch.arange(side)[:, None] * frequencies_Q
    waves_SH = torch.cat([angles_SQ.sin(), angles_SQ.cos()], dim=1)
    rows_SSH = waves_SH[:, None].expand(side, side, -1)
    columns_SSH = waves_SH[None].expand(side, side, -1)
    return torch.cat([rows_SSH, columns_SSH], dim=2).flatten(0, 1)


def _with_tower(
    folder: Path, text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, projection_dim: int
) -> tuple[CLIPModel, CLIPProcessor]:
    tower = CLIPMoEVisionModel.from_pretrained(folder)
    if tower.config.moe_block_indices:
        raise ValueError(f"{folder} is a mixture already; a dense start needs a dense image tower")
    config = CLIPMoEConfig(
        vision_config={**tower.config.to_dict(), "projection_dim": projection_dim},
        text_config={**text_config, "moe_layers": []},
        projection_dim=projection_dim,
    )
    model = CLIPMoEModel(config)
    model.vision_model.load_state_dict(tower.state_dict(), strict=True)
    image_processor = CLIPImageProcessor.from_pretrained(folder)
    return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def _processor(config: ScratchConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    size = config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def _tower(config: ScratchConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size,
        "num_attention_heads": config.num_heads,
        "projection_dim": config.projection_dim,
    }
