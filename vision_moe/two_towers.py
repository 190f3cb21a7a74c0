"""Two pretrained towers as one dual encoder, to be aligned (LiT, Zhai et al. 2022, arXiv:2111.07991)."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    set_seed,
)

from vision_moe.model.families import TOWER_FAMILIES, max_text_tokens
from vision_moe.recipe import TowersConfig


def join_towers(config: TowersConfig, seed: int) -> tuple[VisionTextDualEncoderModel, VisionTextDualEncoderProcessor]:
    """A dual encoder of pretrained towers and random projections, and its processor.

    Args:
        config: the towers; a CLIP stands for its image tower.
        seed: of the projections, and of poolers that a tower's folder does not hold.

    Raises:
        ValueError: a tower is of no family that vision_moe knows, or of the other modality.
    """
    vision, text = (AutoConfig.from_pretrained(name) for name in (config.vision, config.text))
    # transformers takes the image tower out of a whole CLIP.
    images = {"clip", *(row.dense for row in TOWER_FAMILIES if row.modality == "vision" and row.fixed_resolution)}
    texts = {row.dense for row in TOWER_FAMILIES if row.modality == "text"}
    for field, found, known in (("vision", vision, images), ("text", text, texts)):
        if found.model_type not in known:
            raise ValueError(
                f"towers.{field} must be one of {', '.join(sorted(known))}, but {getattr(config, field)} is a "
                f"{found.model_type}"
            )
    set_seed(seed)
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(
        config.vision, config.text, projection_dim=config.projection_dim
    )
    tokenizer = AutoTokenizer.from_pretrained(config.text)
    # Some tokenizers state no limit.
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_text_tokens(text))
    image_processor = AutoImageProcessor.from_pretrained(config.vision)
    return model, VisionTextDualEncoderProcessor(image_processor=image_processor, tokenizer=tokenizer)
