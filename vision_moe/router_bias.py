"""Loss-free balancing in training: a Trainer callback that moves the routers' choice bias after each optimizer step.

L MoE blocks of a tower, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.distributed import sum_over_ranks
from vision_moe.model import CLIPMoETextModel, CLIPMoEVisionModel
from vision_moe.model.tower import MoETower
from vision_moe.moe.balance import bias_step
from vision_moe.moe.router import Router


class RouterBiasCallback(TrainerCallback):
    """Counts the tokens of every micro-batch and rank, and lets each optimizer step end with one step of the biases.

    Only what a tower returns is counted, once for each of its forwards in training mode and with gradients: a gradient
    cache runs it without them first, and a block that runs again under activation checkpointing returns nothing from
    its tower. Towers whose config has no `router_bias_update_rate` are left alone. Without this callback the biases
    stay as they are.
    """

    def __init__(self) -> None:
        self._counts_LE: dict[nn.Module, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts to count in all towers of the model."""
        assert model is not None
        self._stop()
        for tower in model.modules():
            is_tower = isinstance(tower, CLIPMoEVisionModel | CLIPMoETextModel | MoETower)
            if is_tower and tower.config.router_bias_update_rate:
                zeros_LE = torch.zeros(len(_routers(tower)), tower.config.num_experts, dtype=torch.int64)
                self._counts_LE[tower] = zeros_LE.to(next(tower.parameters()).device)
                self._hooks.append(tower.register_forward_hook(self._count))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the biases by the counts of all ranks since the last step, and counts from 0 again."""
        for tower, counts_LE in self._counts_LE.items():
            config = tower.config
            step_LE = bias_step(sum_over_ranks(counts_LE), config.router_bias_update_rate, config.router_bias_update)
            for router, step_E in zip(_routers(tower), step_LE, strict=True):
                assert router.choice_bias is not None
                router.choice_bias += step_E.to(router.choice_bias.device)
            self._counts_LE[tower] = torch.zeros_like(counts_LE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops counting."""
        self._stop()

    def _count(self, tower: nn.Module, args: Any, output: Any) -> None:
        if tower.training and torch.is_grad_enabled() and output.tokens_per_expert is not None:
            self._counts_LE[tower] = self._counts_LE[tower] + output.tokens_per_expert

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._counts_LE = [], {}


def _routers(tower: nn.Module) -> list[Router]:
    """The tower's routers, in the order of its blocks."""
    return [module for module in tower.modules() if isinstance(module, Router)]
