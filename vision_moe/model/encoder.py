"""The blocks of a CLIP-MoE tower: CLIP's, with some MLPs replaced by mixtures.

B batch, S sequence, D model dim, E experts, L MoE blocks of a tower.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from vision_moe.kernels.linear import replace_linears
from vision_moe.model.configuration import CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.model.configuration_limoe import LIMoEConfig
from vision_moe.moe.layer import MoEMLP
from vision_moe.moe.losses import AuxLossWeights, aux_loss, local_entropy_loss, share_logits
from vision_moe.moe.token_mean import TokenMeans, means_of_step

TowerConfig = CLIPMoEVisionConfig | CLIPMoETextConfig | LIMoEConfig
LayerOutput = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class CLIPMoEEncoderLayer(CLIPEncoderLayer):
    """A pre-norm transformer block whose MLP is dense or a mixture."""

    def __init__(self, config: TowerConfig, layer: int) -> None:
        super().__init__(config)
        if layer in config.moe_block_indices:
            self.mlp = MoEMLP(config)
        replace_linears(self)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, mask_BS: Tensor | None, **kwargs: Any
    ) -> LayerOutput:
        """One block.

        Args:
            hidden_states: float[B, S, D].
            attention_mask: what the attention implementation takes.
            mask_BS: bool[B, S], False at padding; None = no padding.
            **kwargs: passed on to the attention.

        Returns:
            hidden states float[B, S, D], then what `MoEOutput` holds, None for a dense MLP: router logits, noisy router
            logits, tokens per expert, dropped fraction. They are returned, and not collected by hooks, so that a
            checkpointed block that runs twice counts once.
        """
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        return self.feed_forward(hidden_states + attended, mask_BS)

    def feed_forward(
        self, hidden_states: Tensor, mask_BS: Tensor | None, parts: tuple[int, ...] | None = None
    ) -> LayerOutput:
        """The second half of the block; `parts` as in `MoEMLP`."""
        normed = self.layer_norm2(hidden_states)
        if not isinstance(self.mlp, MoEMLP):
            return hidden_states + self.mlp(normed), None, None, None, None
        moe = self.mlp(normed, mask_BS, parts)
        return hidden_states + moe.hidden_states_BSD, *moe[1:]


class EncoderOutput(NamedTuple):
    """Output of a stack of blocks.

    Attributes:
        last_hidden_state: float[B, S, D].
        router_logits: L tensors float32[B, S, E], noise-free.
        noisy_logits: L tensors float32[B, S, E], or none where no noise was drawn.
        tokens_per_expert: int64[L, E], choices of valid tokens, before any is dropped; None for a dense tower.
        dropped_fraction: float32[L], see `MoEOutput`, and there too for the axis of parts; None for a dense tower.
    """

    last_hidden_state: Tensor
    router_logits: tuple[Tensor, ...]
    noisy_logits: tuple[Tensor, ...]
    tokens_per_expert: Tensor | None
    dropped_fraction: Tensor | None


class CLIPMoEEncoder(nn.Module):
    """The blocks of one tower; its weights carry the names of `CLIPEncoder`'s."""

    layer_class = CLIPMoEEncoderLayer

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(self.layer_class(config, layer) for layer in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        mask_BS: Tensor | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """All blocks in turn; arguments as in `CLIPMoEEncoderLayer`."""
        router_logits, noisy_logits, tokens_per_expert, dropped = [], [], [], []
        for layer in self.layers:
            hidden_states, logits_BSE, noisy_BSE, tokens_E, fraction = layer(
                hidden_states, attention_mask, mask_BS, **kwargs
            )
            if logits_BSE is not None:
                router_logits.append(logits_BSE)
                tokens_per_expert.append(tokens_E)
                # Re-entrant checkpointing marks every float that leaves a block as differentiable.
                dropped.append(fraction.detach())
            if noisy_BSE is not None:
                noisy_logits.append(noisy_BSE)
        return EncoderOutput(
            hidden_states,
            tuple(router_logits),
            tuple(noisy_logits),
            torch.stack(tokens_per_expert) if tokens_per_expert else None,
            torch.stack(dropped) if dropped else None,
        )


def tower_aux_loss(
    config: TowerConfig,
    encoded: EncoderOutput,
    mask_BS: Tensor | None,
    weights: AuxLossWeights | None = None,
    means: TokenMeans | None = None,
) -> Tensor:
    """Mean over the tower's MoE blocks of their weighted router losses (CLIP-MoE, eq. 9).

    Where they have gradients, over the tokens of all ranks, unless the config's `local_router_losses` says otherwise;
    every rank must then come here. Without gradients, which is to say in evaluation, over those of this process.

    Args:
        config: of the tower.
        encoded: what its blocks returned.
        mask_BS: bool[B, S], False at padding; None = no padding.
        weights: coefficients; None = the config's `aux_loss_weights`.
        means: over tokens, that the losses are functions of; None = `means_of_step`.

    Returns:
        float32 scalar, coefficients applied; 0 for a dense tower.
    """
    if not encoded.router_logits:
        return torch.zeros((), device=encoded.last_hidden_state.device)
    mask_T = None if mask_BS is None else mask_BS.flatten()
    noisy_logits = encoded.noisy_logits or (None,) * len(encoded.router_logits)
    is_local = config.local_router_losses or (means is None and not encoded.router_logits[0].requires_grad)
    mean = (means or means_of_step)(local=is_local)
    losses = [
        aux_loss(
            logits_BSE.flatten(0, 1),
            None if noisy_BSE is None else noisy_BSE.flatten(0, 1),
            mask_T,
            top_k=config.num_experts_per_tok,
            noise_std=config.router_noise_std / config.num_experts,
            scoring_func=config.scoring_func,
            weights=config.aux_loss_weights if weights is None else weights,
            mean=mean,
        )
        for logits_BSE, noisy_BSE in zip(encoded.router_logits, noisy_logits, strict=True)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def gate_statistics(
    config: TowerConfig, encoded: EncoderOutput, mask_BS: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mean gates float32[L, E] and mean entropy (nats) of the gates float32[L], over valid tokens.

    None and None for a dense tower.
    """
    if not encoded.router_logits:
        return None, None
    gates, entropies = [], []
    for logits_BSE in encoded.router_logits:
        logits_TE = logits_BSE.flatten(0, 1) if mask_BS is None else logits_BSE[mask_BS]
        logits_TE = share_logits(logits_TE, config.scoring_func)
        gates.append(logits_TE.softmax(dim=-1).mean(dim=0))
        entropies.append(local_entropy_loss(logits_TE))
    return torch.stack(gates), torch.stack(entropies)
