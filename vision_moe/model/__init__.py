"""Dual encoders with mixtures as transformers models; importing this makes the Auto classes know them."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange

from vision_moe.model.bert_moe import (
    BertMoEConfig,
    BertMoEModel,
    RobertaMoEConfig,
    RobertaMoEModel,
    XLMRobertaMoEConfig,
    XLMRobertaMoEModel,
)
from vision_moe.model.clip_moe import CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel
from vision_moe.model.configuration import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.model.configuration_limoe import LIMoEConfig
from vision_moe.model.limoe import LIMoEModel
from vision_moe.model.siglip_moe import (
    Siglip2MoEConfig,
    Siglip2MoEModel,
    Siglip2MoETextConfig,
    Siglip2MoETextModel,
    Siglip2MoEVisionConfig,
    Siglip2MoEVisionModel,
    SiglipMoEConfig,
    SiglipMoEModel,
    SiglipMoETextConfig,
    SiglipMoETextModel,
    SiglipMoEVisionConfig,
    SiglipMoEVisionModel,
)
from vision_moe.model.vision_text_moe import VisionTextDualEncoderMoEConfig, VisionTextDualEncoderMoEModel
from vision_moe.model.vit_moe import Dinov2MoEConfig, Dinov2MoEModel, ViTMoEConfig, ViTMoEModel

__all__ = [
    "BertMoEConfig",
    "BertMoEModel",
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoETextConfig",
    "CLIPMoETextModel",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "Dinov2MoEConfig",
    "Dinov2MoEModel",
    "LIMoEConfig",
    "LIMoEModel",
    "RobertaMoEConfig",
    "RobertaMoEModel",
    "Siglip2MoEConfig",
    "Siglip2MoEModel",
    "Siglip2MoETextConfig",
    "Siglip2MoETextModel",
    "Siglip2MoEVisionConfig",
    "Siglip2MoEVisionModel",
    "SiglipMoEConfig",
    "SiglipMoEModel",
    "SiglipMoETextConfig",
    "SiglipMoETextModel",
    "SiglipMoEVisionConfig",
    "SiglipMoEVisionModel",
    "ViTMoEConfig",
    "ViTMoEModel",
    "VisionTextDualEncoderMoEConfig",
    "VisionTextDualEncoderMoEModel",
    "XLMRobertaMoEConfig",
    "XLMRobertaMoEModel",
]

_DUAL_ENCODERS = (CLIPMoEModel, SiglipMoEModel, Siglip2MoEModel, VisionTextDualEncoderMoEModel, LIMoEModel)
# Towers of dual encoders whose checkpoints name them vision_model and text_model, in that order.
_PAIRS = (
    (CLIPMoEVisionModel, CLIPMoETextModel),
    (SiglipMoEVisionModel, SiglipMoETextModel),
    (Siglip2MoEVisionModel, Siglip2MoETextModel),
)
_SINGLE_TOWERS = (ViTMoEModel, Dinov2MoEModel, BertMoEModel, RobertaMoEModel, XLMRobertaMoEModel)

for _model in (*_DUAL_ENCODERS, *(tower for pair in _PAIRS for tower in pair), *_SINGLE_TOWERS):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)
for _model in _DUAL_ENCODERS:
    AutoModelForZeroShotImageClassification.register(_model.config_class, _model)
for _vision, _text in _PAIRS:
    # A tower loads from the folder of a whole model, as transformers' own towers do.
    register_checkpoint_conversion_mapping(_vision.__name__, [PrefixChange(prefix_to_remove="vision_model")])
    register_checkpoint_conversion_mapping(_text.__name__, [PrefixChange(prefix_to_remove="text_model")])
