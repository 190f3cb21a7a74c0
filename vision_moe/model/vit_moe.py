"""ViT and DINOv2 with mixtures, image towers of a `VisionTextDualEncoderMoEModel`."""

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Encoder, Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from vision_moe.model.configuration import MoEFields
from vision_moe.model.tower import FamilyPreTrainedModel, MoEBlock, MoETower


@strict
class ViTMoEConfig(MoEFields, ViTConfig):
    """See `MoEFields` and `transformers.ViTConfig`."""

    model_type = "vit_moe"


class ViTMoELayer(MoEBlock, ViTLayer):
    """A block."""


class ViTMoEModel(MoETower, ViTModel):
    """The tower."""

    config: ViTMoEConfig
    block_class = ViTMoELayer


@strict
class Dinov2MoEConfig(MoEFields, Dinov2Config):
    """See `MoEFields` and `transformers.Dinov2Config`."""

    model_type = "dinov2_moe"

    @property
    def intermediate_size(self) -> int:
        """Hidden size of the MLP, which DINOv2 gives as a ratio."""
        return int(self.hidden_size * self.mlp_ratio)


class Dinov2MoELayer(MoEBlock, Dinov2Layer):
    """A block; its LayerScale multiplies what the mixture gives."""


class Dinov2MoEEncoder(FamilyPreTrainedModel, Dinov2Encoder):
    """The blocks, which transformers holds in a model that initializes them."""

    config: Dinov2MoEConfig


class Dinov2MoEModel(MoETower, Dinov2Model):
    """The tower."""

    config: Dinov2MoEConfig
    block_class = Dinov2MoELayer

    def _replace_blocks(self) -> None:
        self.encoder = Dinov2MoEEncoder(self.config)
        super()._replace_blocks()
