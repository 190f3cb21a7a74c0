"""CLIP-MoE (Zhang et al. 2024) as transformers models: transformers' CLIP with some MLPs replaced by mixtures.

Attention, embeddings, norms and projections are transformers' own, and so are their weights' names: a dense CLIP
checkpoint maps onto a CLIP-MoE by name, except for the MLPs of the MoE blocks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPPreTrainedModel, CLIPTextModel, CLIPVisionModel
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPTextEmbeddings, CLIPVisionEmbeddings
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from vision_moe.model.configuration import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.model.encoder import CLIPMoEEncoder, CLIPMoEEncoderLayer
from vision_moe.model.outputs import CLIPMoEOutput, CLIPMoETowerOutput
from vision_moe.model.pretrained import MoEPreTrainedModel
from vision_moe.moe.experts import Experts, SharedExpert


class CLIPMoEPreTrainedModel(MoEPreTrainedModel, CLIPPreTrainedModel):
    """What the three models share: initialization and captured outputs."""

    config: CLIPMoEConfig
    base_model_prefix = "clip_moe"
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPMoEEncoderLayer", "CLIPVisionEmbeddings"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CLIPMoEEncoderLayer,
        "attentions": CLIPAttention,
        "router_logits": OutputRecorder(CLIPMoEEncoderLayer, index=1),
    }

    def _router_deviation(self) -> float:
        return float(self.config.get_text_config().initializer_range * self.config.initializer_factor)

    def _expert_deviations(self, experts: Experts | SharedExpert) -> tuple[float, float]:
        # CLIPMLP's fc1 and fc2.
        dim, depth = experts.config.hidden_size, experts.config.num_hidden_layers
        factor = self.config.initializer_factor
        return (2 * dim) ** -0.5 * factor, dim**-0.5 * (2 * depth) ** -0.5 * factor


class CLIPMoEVisionModel(CLIPMoEPreTrainedModel, CLIPVisionModel):
    """The image tower."""

    config: CLIPMoEVisionConfig

    def __init__(self, config: CLIPMoEVisionConfig) -> None:
        # Past CLIPVisionModel's own constructor, which would build and initialize a dense tower first.
        super(CLIPVisionModel, self).__init__(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = norm if config.pre_layernorm else nn.Identity()
        self.encoder = CLIPMoEEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> CLIPMoETowerOutput:
        """Encodes images.

        Args:
            pixel_values: float[B, 3, H, W].
            interpolate_pos_encoding: accept sizes other than the config's.
            **kwargs: output_hidden_states (a flag, or the index or indices of the states to keep), output_attentions,
                output_router_logits, return_dict.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing; the image tower needs float[B, 3, H, W]")
        embeddings = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        encoded = self.encoder(self.pre_layrnorm(embeddings), **kwargs)
        return CLIPMoETowerOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.post_layernorm(encoded.last_hidden_state[:, 0]),
            **self._routing_fields(encoded, None, kwargs),
        )


class CLIPMoETextModel(CLIPMoEPreTrainedModel, CLIPTextModel):
    """The text tower. Padding is neither routed nor counted, as far as `attention_mask` tells of it."""

    config: CLIPMoETextConfig

    def __init__(self, config: CLIPMoETextConfig) -> None:
        # Past CLIPTextModel's own constructor, which would build and initialize a dense tower first.
        super(CLIPTextModel, self).__init__(config)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPMoEEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CLIPMoETowerOutput:
        """Encodes captions.

        Args:
            input_ids: int64[B, S], each row with an end token.
            attention_mask: [B, S], 0 at padding; None = no padding.
            position_ids: int64[B, S] or [1, S]; None = 0 to S - 1.
            **kwargs: output_hidden_states (a flag, or the index or indices of the states to keep), output_attentions,
                output_router_logits, return_dict.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing; the text tower needs int64[B, S]")
        input_ids = input_ids.view(-1, input_ids.shape[-1])
        mask_BS = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.bool()
        embeddings = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask, past_key_values=None
        )
        kwargs.pop("is_causal", None)
        encoded = self.encoder(embeddings, causal_mask, mask_BS, is_causal=True, **kwargs)
        last_hidden_state = self.final_layer_norm(encoded.last_hidden_state)
        rows_B = torch.arange(input_ids.shape[0], device=input_ids.device)
        return CLIPMoETowerOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[rows_B, self._end_positions(input_ids)],
            **self._routing_fields(encoded, mask_BS, kwargs),
        )

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        """Position of the token whose state stands for the caption, int64[B]: the first end token."""
        if self.config.eos_token_id == 2:
            # Configs written before transformers 4.31 name a wrong end token; the true one has the highest id.
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


class CLIPMoEModel(CLIPMoEPreTrainedModel, CLIPModel):
    """Both towers, projections and `logit_scale`."""

    config: CLIPMoEConfig

    def __init__(self, config: CLIPMoEConfig) -> None:
        # Past CLIPModel's own constructor, which would build and initialize two dense towers first.
        super(CLIPModel, self).__init__(config)
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        self.text_model = CLIPMoETextModel._from_config(config.text_config)
        self.vision_model = CLIPMoEVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> CLIPMoEOutput:
        """Encodes both sides and compares them; see the towers for the inputs' shapes.

        Args:
            input_ids: captions.
            pixel_values: images.
            attention_mask: 0 at padding.
            position_ids: positions of the captions' tokens.
            return_loss: return the contrastive loss of this batch plus the aux loss.
            interpolate_pos_encoding: accept image sizes other than the config's.
            output_router_logits: return router logits and aux loss; None = as the towers' configs say.
            **kwargs: as for the towers.
        """
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_loss=return_loss,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        return self._with_routing(output)
