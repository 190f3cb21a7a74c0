"""The plain mixture that the benchmarks compare with: one nn.Linear pair per expert, visited in a Python loop."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vision_moe.moe.experts import Experts


class LoopExperts(nn.Module):
    """Gathers each expert's tokens, runs its MLP and adds the weighted rows to the output."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        E, F, D = experts.up_proj.shape
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(D, F), ACT2FN[experts.config.hidden_act], nn.Linear(F, D)) for _ in range(E)
        ).to(experts.up_proj.dtype)
        with torch.no_grad():
            for e, mlp in enumerate(self.mlps):
                mlp[0].weight.copy_(experts.up_proj[e])
                mlp[0].bias.copy_(experts.up_proj_bias[e])
                mlp[2].weight.copy_(experts.down_proj[e])
                mlp[2].bias.copy_(experts.down_proj_bias[e])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        y_TD = torch.zeros_like(hidden_states)
        mask_EKT = nn.functional.one_hot(top_k_index, len(self.mlps)).permute(2, 1, 0)
        for e, mlp in enumerate(self.mlps):
            choice, token = torch.where(mask_EKT[e])
            rows = mlp(hidden_states[token]) * top_k_weights[token, choice, None].to(hidden_states.dtype)
            y_TD.index_add_(0, token, rows)
        return y_TD
