"""Muon for the matrices of a model, AdamW for everything else, behind one torch optimizer.

Muon orthogonalises the momentum of a matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon); its
step is scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, equation 4), so that one learning rate
and one weight decay serve both. torch.optim holds both halves; this file only joins them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the weights of `nn.Linear`, AdamW on all other parameters that train (embeddings and heads tied to them,
    norms, biases, convolutions, stacked experts), without weight decay on vectors.

    Args:
        model: its trainable parameters are taken.
        lr: learning rate of both halves.
        weight_decay: decoupled weight decay of both halves.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        ValueError: if no weight of an `nn.Linear` trains; use AdamW then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        # A head tied to the token embeddings is a table, not a map between activations.
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tables
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in linear]
        if not matrices:
            raise ValueError("no weight of a linear layer trains, so there is nothing for Muon; set optimizer: adamw")
        rest = [p for p in trained if id(p) not in linear]
        super().__init__(trained, {})
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps)
        self._join()

    def _join(self) -> None:
        """Schedulers set the learning rate of `param_groups`: they must be the very groups of the two halves."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both halves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both halves by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._join()
