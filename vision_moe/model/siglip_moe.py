"""SigLIP (Zhai et al. 2023, arXiv:2303.15343) and SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786) with mixtures.

Checkpoints of SigLIP 2 at one resolution are of transformers' `siglip`; `siglip2` is NaFlex.
"""

from huggingface_hub.dataclasses import strict
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2TextModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

from vision_moe.model.configuration import MoEFields
from vision_moe.model.dual_encoder import MoEDualEncoder
from vision_moe.model.tower import MoEBlock, MoETower


@strict
class SiglipMoEVisionConfig(MoEFields, SiglipVisionConfig):
    """An image tower; see `MoEFields` and `transformers.SiglipVisionConfig`."""

    model_type = "siglip_moe_vision_model"


@strict
class SiglipMoETextConfig(MoEFields, SiglipTextConfig):
    """A text tower; see `MoEFields` and `transformers.SiglipTextConfig`."""

    model_type = "siglip_moe_text_model"


@strict
class SiglipMoEConfig(SiglipConfig):
    """Both towers; see `transformers.SiglipConfig`."""

    model_type = "siglip_moe"
    sub_configs_defaults = {  # noqa: RUF012  # transformers' class-level protocol
        "vision_config": SiglipMoEVisionConfig,
        "text_config": SiglipMoETextConfig,
    }


class SiglipMoEEncoderLayer(MoEBlock, SiglipEncoderLayer):
    """A block of either tower."""


class SiglipMoEVisionModel(MoETower, SiglipVisionModel):
    """The image tower."""

    config: SiglipMoEVisionConfig
    block_class = SiglipMoEEncoderLayer


class SiglipMoETextModel(MoETower, SiglipTextModel):
    """The text tower."""

    config: SiglipMoETextConfig
    block_class = SiglipMoEEncoderLayer


class SiglipMoEModel(MoEDualEncoder, SiglipModel):
    """Both towers, `logit_scale` and `logit_bias`."""

    config: SiglipMoEConfig


@strict
class Siglip2MoEVisionConfig(MoEFields, Siglip2VisionConfig):
    """An image tower; see `MoEFields` and `transformers.Siglip2VisionConfig`."""

    model_type = "siglip2_moe_vision_model"


@strict
class Siglip2MoETextConfig(MoEFields, Siglip2TextConfig):
    """A text tower; see `MoEFields` and `transformers.Siglip2TextConfig`."""

    model_type = "siglip2_moe_text_model"


@strict
class Siglip2MoEConfig(Siglip2Config):
    """Both towers; see `transformers.Siglip2Config`."""

    model_type = "siglip2_moe"
    sub_configs_defaults = {  # noqa: RUF012  # transformers' class-level protocol
        "vision_config": Siglip2MoEVisionConfig,
        "text_config": Siglip2MoETextConfig,
    }


class Siglip2MoEEncoderLayer(MoEBlock, Siglip2EncoderLayer):
    """A block of either tower."""


class Siglip2MoEVisionModel(MoETower, Siglip2VisionModel):
    """The image tower; patches that fill a batch up are neither routed nor counted."""

    config: Siglip2MoEVisionConfig
    block_class = Siglip2MoEEncoderLayer


class Siglip2MoETextModel(MoETower, Siglip2TextModel):
    """The text tower."""

    config: Siglip2MoETextConfig
    block_class = Siglip2MoEEncoderLayer


class Siglip2MoEModel(MoEDualEncoder, Siglip2Model):
    """Both towers, `logit_scale` and `logit_bias`."""

    config: Siglip2MoEConfig
