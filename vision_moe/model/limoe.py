"""LIMoE (Mustafa et al. 2022, arXiv:2206.02770) as a transformers model: one tower for images and text.

The tokens of both modalities of a batch pass the blocks as one packed row: they share routers, experts and capacity in
one call, and the router does not know a token's modality. Attention is computed within each picture and each caption.
Docs: docs/limoe.md, with what the paper leaves open.

B batch, S sequence, T tokens of all rows of both modalities, D model dim, E experts, L MoE blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPTextEmbeddings,
    image_text_contrastive_loss,
)
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from vision_moe.model.clip_moe import CLIPMoEPreTrainedModel
from vision_moe.model.configuration_limoe import LIMoEConfig
from vision_moe.model.encoder import EncoderOutput, gate_statistics, tower_aux_loss
from vision_moe.model.outputs import CLIPMoEOutput, LIMoEModalityOutput
from vision_moe.model.packed import LIMoEEncoder, LIMoEEncoderLayer, Shapes, pack, pack_masks, unpack, unpack_encoded
from vision_moe.moe.losses import AuxLossWeights


class Stream(NamedTuple):
    """One modality of a batch, on its way into the tower.

    Attributes:
        embeddings_BSD: float[B, S, D].
        mask_BS: bool[B, S], False at padding; None = no padding.
        head: the modality's projection of the pooled state.
        losses: coefficients of the router losses over this modality's tokens.
    """

    embeddings_BSD: Tensor
    mask_BS: Tensor | None
    head: nn.Module
    losses: AuxLossWeights


@dataclass
class PackedOutput(BaseModelOutput):
    """Both modalities as the blocks see them; hidden states are float[1, T, D].

    Attributes:
        encoded: all that the blocks returned.
    """

    encoded: EncoderOutput | None = None


class LIMoEModel(CLIPMoEPreTrainedModel):
    """One tower, an embedding and a head for each modality, and `logit_scale`."""

    config: LIMoEConfig
    base_model_prefix = "limoe"
    _no_split_modules = ["CLIPTextEmbeddings", "LIMoEEncoderLayer", "SiglipVisionEmbeddings"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LIMoEEncoderLayer, "attentions": CLIPAttention}  # noqa: RUF012

    def __init__(self, config: LIMoEConfig) -> None:
        super().__init__(config)
        self.vision_embeddings = SiglipVisionEmbeddings(config)
        self.text_embeddings = CLIPTextEmbeddings(config)
        self.encoder = LIMoEEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's start: embeddings 0.02; q, k, v and the second MLP matrix (2 D L)^-0.5, the attention's output D^-0.5,
        the first MLP matrix (2 D)^-0.5, with L the number of blocks, and experts as MLPs; heads D^-0.5; biases 0.
        """
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, SiglipVisionEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.num_positions)[None])
        elif isinstance(module, LIMoEModel):
            for head in (module.visual_projection, module.text_projection):
                init.normal_(head.weight, std=self.config.hidden_size**-0.5 * factor)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.text_embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.text_embeddings.token_embedding = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> LIMoEModalityOutput:
        """Encodes pictures alone; `pooler_output` float[B, projection_dim] is the projected embedding, of any length.

        Args:
            pixel_values: float[B, 3, H, W].
            interpolate_pos_encoding: accept sizes other than the config's.
            **kwargs: as in `forward`.
        """
        return self._run([self._images(pixel_values, interpolate_pos_encoding)], **kwargs)[0][0]

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> LIMoEModalityOutput:
        """Encodes captions alone; `pooler_output` float[B, projection_dim] is the projected embedding, of any length.

        Args:
            input_ids: int64[B, S].
            attention_mask: [B, S], 0 at padding, which is neither attended to, routed, pooled nor counted; None = no
                padding.
            position_ids: int64[B, S] or [1, S]; None = 0 to S - 1.
            **kwargs: as in `forward`.
        """
        return self._run([self._captions(input_ids, attention_mask, position_ids)], **kwargs)[0][0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> CLIPMoEOutput:
        """Encodes both sides in one pass and compares them.

        Args:
            input_ids: as in `get_text_features`.
            pixel_values: as in `get_image_features`; the numbers of pictures and captions may differ.
            attention_mask: as in `get_text_features`.
            position_ids: as in `get_text_features`.
            return_loss: return the contrastive loss of this batch plus the aux loss.
            interpolate_pos_encoding: accept image sizes other than the config's.
            **kwargs: output_router_logits (None = as the config says), output_hidden_states (a flag, or the index or
                indices of the states to keep), output_attentions, return_dict.

        Returns:
            `vision_model_output` and `text_model_output` are `LIMoEModalityOutput`.
        """
        if input_ids is None or pixel_values is None:
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(f"{missing} is missing; for one side alone call get_image_features or get_text_features")
        images = self._images(pixel_values, interpolate_pos_encoding)
        captions = self._captions(input_ids, attention_mask, position_ids)
        (vision, text), aux_loss = self._run([images, captions], **kwargs)
        image_embeds, text_embeds = (nn.functional.normalize(side.pooler_output, dim=-1) for side in (vision, text))
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.t()
        loss = image_text_contrastive_loss(logits_per_text) if return_loss else None
        return CLIPMoEOutput(
            loss=loss if loss is None or aux_loss is None else loss + aux_loss,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            router_logits=(vision.router_logits or ()) + (text.router_logits or ()) or None,
            aux_loss=aux_loss,
        )

    def _images(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Stream:
        side = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side) and not interpolate_pos_encoding:
            raise ValueError(
                f"pictures must be {side} x {side} pixels, but got {tuple(pixel_values.shape)}; pass "
                "interpolate_pos_encoding=True for other sizes"
            )
        embeddings = self.vision_embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return Stream(embeddings, None, self.visual_projection, self.config.image_loss_weights)

    def _captions(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Stream:
        embeddings = self.text_embeddings(input_ids=input_ids, position_ids=position_ids)
        mask_BS = None if attention_mask is None else attention_mask.bool()
        return Stream(embeddings, mask_BS, self.text_projection, self.config.text_loss_weights)

    def _run(self, streams: Sequence[Stream], **kwargs: Any) -> tuple[list[LIMoEModalityOutput], Tensor | None]:
        """All streams through the tower at once: one output for each, and the aux loss of them all."""
        shapes = tuple((len(stream.embeddings_BSD), stream.embeddings_BSD.shape[1]) for stream in streams)
        mask_1T = pack_masks([stream.mask_BS for stream in streams], shapes)
        packed = self._encode(streams, mask_1T, shapes, return_dict=True, **kwargs)
        outputs = [self._output(stream, packed, shapes, number) for number, stream in enumerate(streams)]
        wants_logits = kwargs.get("output_router_logits")
        wants_logits = self.config.output_router_logits if wants_logits is None else wants_logits
        if not (self.training or wants_logits):
            return outputs, None
        means = kwargs.get("router_means")
        aux_loss = tower_aux_loss(self.config, packed.encoded, mask_1T, means=means)
        for stream, output, encoded in zip(streams, outputs, unpack_encoded(packed.encoded, shapes), strict=True):
            output.router_logits = encoded.router_logits if wants_logits else None
            output.aux_loss = tower_aux_loss(self.config, encoded, stream.mask_BS, stream.losses, means)
            output.tokens_per_expert, output.dropped_fraction = encoded.tokens_per_expert, encoded.dropped_fraction
            output.mean_gates, output.gate_entropy = gate_statistics(self.config, encoded, stream.mask_BS)
            aux_loss = aux_loss + output.aux_loss
        return outputs, aux_loss

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(self, streams: Sequence[Stream], mask_1T: Tensor | None, shapes: Shapes, **kwargs: Any) -> PackedOutput:
        attention_masks = [
            create_bidirectional_mask(self.config, inputs_embeds=stream.embeddings_BSD, attention_mask=stream.mask_BS)
            for stream in streams
        ]
        packed_1TD = pack([stream.embeddings_BSD for stream in streams])
        encoded = self.encoder(packed_1TD, attention_masks, mask_1T, shapes=shapes, **kwargs)
        return PackedOutput(last_hidden_state=self.post_layernorm(encoded.last_hidden_state), encoded=encoded)

    def _output(self, stream: Stream, packed: PackedOutput, shapes: Shapes, number: int) -> LIMoEModalityOutput:
        """The states of one modality, and their projected mean over its valid tokens."""
        states_BSD = unpack(packed.last_hidden_state, shapes)[number]
        if stream.mask_BS is None:
            pooled_BD = states_BSD.mean(dim=1)
        else:
            weights_BS1 = stream.mask_BS[..., None].to(states_BSD.dtype)
            pooled_BD = (states_BSD * weights_BS1).sum(dim=1) / weights_BS1.sum(dim=1)
        output = LIMoEModalityOutput(last_hidden_state=states_BSD, pooler_output=stream.head(pooled_BD))
        if packed.hidden_states is not None:
            kept = packed.hidden_states
            output.hidden_states = tuple(None if state is None else unpack(state, shapes)[number] for state in kept)
        if packed.attentions is not None:
            # A block attends once for each modality.
            output.attentions = packed.attentions[number :: len(shapes)]
        return output
