"""transformers' VisionTextDualEncoderModel with mixtures: any image tower beside any text tower of the table."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn.functional import normalize
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder import image_text_contrastive_loss

from vision_moe.model.dual_encoder import MoEDualEncoder


@strict
class VisionTextDualEncoderMoEConfig(VisionTextDualEncoderConfig):
    """Both towers, each with `MoEFields`, and the projections; see `transformers.VisionTextDualEncoderConfig`."""

    model_type = "vision-text-dual-encoder-moe"
    sub_configs_defaults = {  # noqa: RUF012  # transformers' class-level protocol
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit_moe"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert_moe"),
    }


class _DualEncoder(VisionTextDualEncoderModel):
    """transformers' model, except that its forward hands further arguments to the towers."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CLIPOutput:
        assert return_dict
        vision = self.vision_model(pixel_values=pixel_values, **kwargs)
        text = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        image_embeds = normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        return CLIPOutput(
            loss=image_text_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class VisionTextDualEncoderMoEModel(MoEDualEncoder, _DualEncoder):
    """Both towers, projections and `logit_scale`."""

    config: VisionTextDualEncoderMoEConfig
    # The towers do; transformers' own class does not say so.
    supports_gradient_checkpointing = True
