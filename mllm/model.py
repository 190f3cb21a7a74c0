"""LLaVA-1.5 with a CLIP or CLIP-MoE vision tower (Liu et al. 2023, arXiv:2310.03744).

transformers' LlavaForConditionalGeneration, which also loads what this one saves, with a training forward of its own:
the head runs where it is supervised, every batch runs the tower, and an unfrozen tower's router losses count.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

# Importing it registers CLIP-MoE with transformers, or a saved vision_config would be of unknown type.
import vision_moe.model  # noqa: F401
from mllm.loss import supervised_loss
from mllm.router_step import RouterStep
from mllm.tower_fingerprint import check_tower
from vision_moe.distributed import world_size


@dataclass
class LlavaMoEOutput(LlavaCausalLMOutputWithPast):
    """Beyond `LlavaCausalLMOutputWithPast`:

    Attributes:
        loss: in training, language loss plus the tower's aux loss, if it trains.
        logits: None in training.
        aux_loss: the tower's router losses, coefficients applied, detached; None if it is dense, frozen or saw no
            picture.
    """

    aux_loss: Tensor | None = None


class LlavaMoEForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA; without labels, or in evaluation, it computes what its parent does."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the vision tower is not the one that the config records, see `mllm.tower_fingerprint`.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        check_tower(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def train(self, mode: bool = True) -> "LlavaMoEForConditionalGeneration":
        """Sets the mode of all parts; a frozen tower stays in evaluation, without router noise and aux loss."""
        super().train(mode)
        if mode and not self._tower_trains():
            self.model.vision_tower.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        router_step: RouterStep | None = None,
        **kwargs: Any,
    ) -> LlavaMoEOutput | LlavaCausalLMOutputWithPast:
        """One batch of B samples.

        Args:
            input_ids: int64[B, S], image tokens expanded.
            pixel_values: float[N, 3, H, W], the pictures in the order of their tokens; None for text alone.
            attention_mask: [B, S], 0 at padding.
            position_ids: int64[B, S]; None = counted.
            labels: int64[B, S], -100 where nothing is supervised.
            num_items_in_batch: supervised tokens of the whole step, as transformers' Trainer counts them; None = of
                this batch.
            router_step: for the router losses of the whole step (`mllm.router_step`); None = of this batch.
            **kwargs: as in `LlavaForConditionalGeneration.forward`.
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        if labels is None or not self.training:
            if labels is not None and num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, labels=labels, **inputs)
        return self._forward_training(input_ids, pixel_values, labels, num_items_in_batch, router_step, inputs)

    def _forward_training(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor,
        num_items: Tensor | int | None,
        router_step: RouterStep | None,
        inputs: dict[str, Any],
    ) -> LlavaMoEOutput:
        images = self._image_features(self.blank_picture() if pixel_values is None else pixel_values, router_step)
        if pixel_values is None:
            # No rows of a blank picture go into the text, yet every rank runs tower and projector and has gradients for
            # them, and through the first layer for the text even if all else before it is frozen, as under LoRA: ranks
            # that differ in this hang under DDP or ZeRO-3.
            images.pooler_output = [features[:0] for features in images.pooler_output]
        inputs["mm_encoder_outputs"] = {"image": images}
        outputs = self.model(input_ids=input_ids, **{**inputs, "return_dict": True, "use_cache": False})
        loss, num_supervised = supervised_loss(outputs.last_hidden_state, labels, self.lm_head, num_items)
        aux_loss = images.aux_loss if self.has_router_losses else None
        if aux_loss is not None:
            # The Trainer sums the losses of a step's micro batches: shares that sum to 1 make the aux losses a mean.
            share = 1.0 if num_items is None else num_supervised / num_items
            if pixel_values is None:
                loss, aux_loss = loss + 0.0 * aux_loss, None
            elif router_step is None:
                loss = loss + share * aux_loss
            else:
                # Its gradients are this batch's share of the step's already, and the Trainer counts each rank in full.
                own = (aux_loss - aux_loss.detach()) / (1 if num_items is None else world_size())
                loss = loss + share * aux_loss.detach() + own
        return LlavaMoEOutput(
            loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=None if aux_loss is None else aux_loss.detach(),
        )

    def blank_picture(self) -> Tensor:
        """float[1, 3, H, W], what the tower runs on where there is text alone."""
        config, tower = self.config.vision_config, self.model.vision_tower
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return torch.zeros(shape, dtype=tower.dtype, device=tower.device)

    @property
    def has_router_losses(self) -> bool:
        """Whether the tower is a mixture that trains, with router losses."""
        tower = self.config.vision_config
        is_mixture = bool(getattr(tower, "moe_block_indices", ()))
        return is_mixture and tower.aux_loss_weights.any() and self._tower_trains()

    def _image_features(self, pixel_values: Tensor, router_step: RouterStep | None) -> BaseModelOutputWithPooling:
        if router_step is None:
            return self.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        with router_step.tower_forward():
            return self.model.get_image_features(
                pixel_values=pixel_values, return_dict=True, router_means=router_step.means
            )

    def _tower_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.vision_tower.parameters())
