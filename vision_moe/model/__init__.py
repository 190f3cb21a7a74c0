"""CLIP-MoE and LIMoE as transformers models; importing this makes the Auto classes know them."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange

from vision_moe.model.clip_moe import CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel
from vision_moe.model.configuration import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.model.configuration_limoe import LIMoEConfig
from vision_moe.model.limoe import LIMoEModel

__all__ = [
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoETextConfig",
    "CLIPMoETextModel",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "LIMoEConfig",
    "LIMoEModel",
]

AutoConfig.register("clip_moe", CLIPMoEConfig)
AutoConfig.register("clip_moe_vision_model", CLIPMoEVisionConfig)
AutoConfig.register("clip_moe_text_model", CLIPMoETextConfig)
AutoModel.register(CLIPMoEConfig, CLIPMoEModel)
AutoModel.register(CLIPMoEVisionConfig, CLIPMoEVisionModel)
AutoModel.register(CLIPMoETextConfig, CLIPMoETextModel)
AutoModelForZeroShotImageClassification.register(CLIPMoEConfig, CLIPMoEModel)
AutoConfig.register("limoe", LIMoEConfig)
AutoModel.register(LIMoEConfig, LIMoEModel)
AutoModelForZeroShotImageClassification.register(LIMoEConfig, LIMoEModel)
# A tower loads from the folder of a whole model, as transformers' CLIP towers do.
register_checkpoint_conversion_mapping("CLIPMoEVisionModel", [PrefixChange(prefix_to_remove="vision_model")])
register_checkpoint_conversion_mapping("CLIPMoETextModel", [PrefixChange(prefix_to_remove="text_model")])
