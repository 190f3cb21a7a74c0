"""Any tower of the families' table with mixtures: transformers' own model, whose blocks have other MLPs.

The blocks of transformers return a tensor and know no mixture, so what a mixture needs (which tokens are padding) and
gives (router logits, counts) goes beside them, in a `Routing` that the tower's forward passes to its blocks. It is
an argument of the blocks, so that a block that activation checkpointing runs again finds it again.

B batch, S sequence, D model dim.
"""

import inspect
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_moe.kernels.linear import replace_linears
from vision_moe.model.encoder import EncoderOutput
from vision_moe.model.families import tower_family
from vision_moe.model.outputs import CLIPMoETowerOutput
from vision_moe.model.pretrained import MoEPreTrainedModel
from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.layer import MoEMLP, MoEOutput


class Routing:
    """What one forward of a tower tells its mixtures and hears from them.

    Args:
        mask_BS: bool[B, S], False at padding; None = no padding.
    """

    def __init__(self, mask_BS: Tensor | None) -> None:
        self.mask_BS = mask_BS
        self._has_grad = torch.is_grad_enabled()
        self._outputs: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] | None = []

    def record(self, moe: MoEOutput) -> None:
        """Keeps a block's routing; nothing once the forward is over, when a block runs again for its gradient.

        Raises:
            ValueError: the block runs under re-entrant checkpointing, whose gradients only reach what a block returns.
        """
        if self._outputs is None:
            return
        if self._has_grad and not torch.is_grad_enabled():
            raise ValueError(
                "re-entrant activation checkpointing would leave the router losses of this model without gradient; "
                "set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self._outputs.append(moe[1:])

    def finish(self, last_hidden_state: Tensor) -> EncoderOutput:
        """All that was recorded, in the order of the blocks; ends the recording."""
        outputs, self._outputs = self._outputs or [], None
        return EncoderOutput(
            last_hidden_state,
            tuple(logits_BSE for logits_BSE, _, _, _ in outputs),
            tuple(noisy_BSE for _, noisy_BSE, _, _ in outputs if noisy_BSE is not None),
            torch.stack([tokens_E for _, _, tokens_E, _ in outputs]) if outputs else None,
            torch.stack([fraction.detach() for _, _, _, fraction in outputs]) if outputs else None,
        )


# From a block to its MLP, for the time of the block's forward.
_ROUTING: ContextVar[Routing | None] = ContextVar("routing", default=None)


class RoutedMLP(MoEMLP):
    """A mixture with the interface of the dense MLP that it replaces."""

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        """Maps float[B, S, D] to float[B, S, D], zero at padding."""
        routing = _ROUTING.get()
        moe = super().forward(x_BSD, None if routing is None else routing.mask_BS)
        if routing is not None:
            routing.record(moe)
        return moe.hidden_states_BSD

    @property
    def padding_mask(self) -> Tensor | None:
        """bool[B, S] of the batch that the block runs on right now, False at padding; None for none."""
        routing = _ROUTING.get()
        return None if routing is None else routing.mask_BS


class MoEBlock(nn.Module):
    """Base beside a family's block, before it: takes the tower's `Routing` and shows it to the block's mixture."""

    def forward(self, hidden_states: Tensor, *args: Any, routing: Routing | None = None, **kwargs: Any) -> Any:
        """The family's block; arguments beside `routing` are its own."""
        token = _ROUTING.set(routing)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            _ROUTING.reset(token)


class FamilyPreTrainedModel(MoEPreTrainedModel):
    """Base of the towers and, where those hold their blocks in a model of its own, of that one."""

    def _router_deviation(self) -> float:
        return float(getattr(self.config, "initializer_range", 0.02))

    def _expert_deviations(self, experts: Experts | SharedExpert) -> tuple[float, float]:
        # The families start an MLP with their initializer_range or, without one, by Xavier's rule.
        xavier = (2 / (experts.up_proj.shape[-1] + experts.up_proj.shape[-2])) ** 0.5
        deviation = float(getattr(self.config, "initializer_range", xavier))
        return deviation, deviation


class MoETower(FamilyPreTrainedModel):
    """Base beside a family's tower, before it; its config holds the family's fields and MoEFields.

    Attributes:
        block_class: the family's block with `MoEBlock` before it.
    """

    block_class: ClassVar[type[MoEBlock]]

    def __init__(self, config: Any) -> None:
        family = tower_family(config)
        for name, value in family.required.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"a mixture of {family.dense} needs {name}={value}, but got {name}={getattr(config, name)}"
                )
        super().__init__(config)
        self._replace_blocks()
        self.post_init()
        self._no_split_modules.add(self.block_class.__name__)

    def _replace_blocks(self) -> None:
        config, family = self.config, tower_family(self.config)
        blocks = self.get_submodule(family.blocks)
        for index in range(config.num_hidden_layers):
            block = self.block_class(config)
            if index in config.moe_block_indices:
                block.set_submodule(family.mlp, RoutedMLP(config))
                if not family.fc2.startswith(f"{family.mlp}."):
                    block.set_submodule(family.fc2, nn.Identity())
            replace_linears(block)
            blocks[index] = block

    def forward(
        self, *args: Any, output_router_logits: bool | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> CLIPMoETowerOutput:
        """The family's forward, whose arguments it takes.

        Args:
            *args: the family's.
            output_router_logits: return router logits and aux loss; None = as the config says.
            return_dict: False returns a tuple; None = as the config says.
            **kwargs: the family's.
        """
        wants_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        dense_forward = super().forward
        inputs = {**dict(zip(inspect.signature(dense_forward).parameters, args, strict=False)), **kwargs}
        mask_BS = _token_mask(inputs.get(tower_family(self.config).mask or ""))
        routing = Routing(mask_BS)
        dense = dense_forward(**inputs, routing=routing, return_dict=True)
        encoded = routing.finish(dense.last_hidden_state)
        output = CLIPMoETowerOutput(
            last_hidden_state=dense.last_hidden_state,
            pooler_output=dense.pooler_output,
            hidden_states=dense.hidden_states,
            attentions=dense.attentions,
            router_logits=encoded.router_logits or None if wants_logits else None,
            **self._routing_fields(encoded, mask_BS, {"output_router_logits": wants_logits}),
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def _token_mask(mask: Tensor | None) -> Tensor | None:
    """bool[B, S] of a padding mask; a mask of more dims says nothing of tokens."""
    return mask.bool() if mask is not None and mask.dim() == 2 else None
