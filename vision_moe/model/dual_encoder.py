"""Any dual encoder of the families' table with mixtures in its towers."""

from typing import Any

from transformers import AutoModel

from vision_moe.model.outputs import CLIPMoEOutput
from vision_moe.model.pretrained import MoEPreTrainedModel


class MoEDualEncoder(MoEPreTrainedModel):
    """Base beside a family's dual encoder, before it; its config holds those of two towers with `MoEFields`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # In the place of the dense towers that the family's own constructor has built.
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(
        self, *args: Any, output_router_logits: bool | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> CLIPMoEOutput:
        """The family's forward, whose arguments it takes.

        Args:
            *args: the family's.
            output_router_logits: return router logits and aux loss; None = as the towers' configs say.
            return_dict: False returns a tuple; None = as the config says.
            **kwargs: the family's; with return_loss the loss is the contrastive one of this batch plus the aux loss.
        """
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        output = self._with_routing(super().forward(*args, return_dict=True, **kwargs))
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()
