"""What all models with mixtures share, whatever their family."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from vision_moe.kernels.interface import NAME as EXPERTS_IMPLEMENTATION
from vision_moe.model.encoder import EncoderOutput, tower_aux_loss
from vision_moe.model.outputs import CLIPMoEOutput
from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.router import Router


class MoEPreTrainedModel(PreTrainedModel):
    """Base beside the family's own, before it.

    It holds the mixtures' start, the experts' implementation, and what a tower returns of its routing.
    """

    _keep_in_fp32_modules_strict = ["choice_bias"]  # noqa: RUF012  # transformers' class-level protocol

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in this file's text; the experts live in vision_moe.moe.experts.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation asked for, or our kernels: see vision_moe.moe.experts."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, std=self._router_deviation())
            if module.choice_bias is not None:
                init.zeros_(module.choice_bias)
        elif isinstance(module, Experts | SharedExpert):
            up, down = self._expert_deviations(module)
            init.normal_(module.up_proj, std=up)
            init.normal_(module.down_proj, std=down)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)

    def _router_deviation(self) -> float:
        """Standard deviation of a router's first weights."""
        raise NotImplementedError

    def _expert_deviations(self, experts: Experts | SharedExpert) -> tuple[float, float]:
        """Those of both matrices of an expert, which starts as the MLP it replaces would."""
        raise NotImplementedError

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For models that are not its own, transformers passes over modules without a parameter of their own, such as an
        # attention, as their code might not know which weights were loaded. `_init_weights` here knows it.
        super()._initialize_weights(module)

    def _routing_fields(
        self, encoded: EncoderOutput, mask_BS: Tensor | None, kwargs: dict[str, Any]
    ) -> dict[str, Tensor | None]:
        """A tower's aux loss and counts, where they are wanted."""
        wants_logits = kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
        if not (self.training or wants_logits):
            return {}
        return {
            "aux_loss": tower_aux_loss(self.config, encoded, mask_BS, means=kwargs.get("router_means")),
            "tokens_per_expert": encoded.tokens_per_expert,
            "dropped_fraction": encoded.dropped_fraction,
        }

    def _with_routing(self, output: Any) -> CLIPMoEOutput:
        """A dual encoder's output with the router logits and the aux loss of its towers, the latter in the loss."""
        towers = output.vision_model_output, output.text_model_output
        aux_loss = self._mean_aux_loss(*(tower.aux_loss for tower in towers))
        if output.loss is not None and aux_loss is not None:
            output.loss = output.loss + aux_loss
        router_logits = tuple(logits for tower in towers for logits in tower.router_logits or ()) or None
        return CLIPMoEOutput(**output, router_logits=router_logits, aux_loss=aux_loss)

    def _mean_aux_loss(self, vision_loss: Tensor | None, text_loss: Tensor | None) -> Tensor | None:
        """Mean over the blocks of both towers, from the means over each tower's."""
        if vision_loss is None or text_loss is None:
            return None
        num_vision = len(self.config.vision_config.moe_block_indices)
        num_text = len(self.config.text_config.moe_block_indices)
        num_blocks = max(1, num_vision + num_text)
        return (num_vision * vision_loss + num_text * text_loss.to(vision_loss.device)) / num_blocks
