"""Patch dropout: the image tower trains on a random part of each picture's patches (FLIP, Li et al. 2023,
arXiv:2212.00794).

B batch, S tokens of a picture, P patches among them, D model dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.model.families import TOWER_BY_TYPE


def drop_patches(embeddings_BSD: Tensor, rate: float, *, num_class_tokens: int) -> Tensor:
    """Keeps round((1 - rate) * P) patches of each picture, at least one, drawn anew for each, in their order.

    Args:
        embeddings_BSD: float[B, S, D], positions added; class tokens, then P patches.
        rate: share to drop, in [0, 1).
        num_class_tokens: S - P; these are always kept.

    Returns:
        float[B, num_class_tokens + kept, D].
    """
    B, S, D = embeddings_BSD.shape
    num_patches = S - num_class_tokens
    num_kept = max(1, round((1 - rate) * num_patches))
    draws_BP = torch.rand(B, num_patches, device=embeddings_BSD.device)
    kept_BK = draws_BP.topk(num_kept, dim=-1).indices.sort(dim=-1).values + num_class_tokens
    class_BC = torch.arange(num_class_tokens, device=embeddings_BSD.device).expand(B, -1)
    rows_BN = torch.cat([class_BC, kept_BK], dim=1)
    return embeddings_BSD.gather(1, rows_BN[..., None].expand(-1, -1, D))


class PatchDropoutCallback(TrainerCallback):
    """Drops patches between the image tower's embeddings and its blocks, while the stage trains and in training mode.

    Dense models and mixtures alike: blocks and routers see shorter pictures. Nothing of it stays in the model.

    Args:
        rate: share of the patches to drop, in [0, 1).
        model: a dual encoder.

    Raises:
        ValueError: its image tower is not one of the families' table, or takes padded pictures.
    """

    def __init__(self, rate: float, model: PreTrainedModel) -> None:
        tower = getattr(model, "vision_model", None)
        family = None if tower is None else TOWER_BY_TYPE.get(tower.config.model_type)
        if tower is None or family is None or not family.fixed_resolution:
            raise ValueError(
                f"patch_dropout needs an image tower of its own that takes pictures of one size, which a "
                f"{model.config.model_type} has not; set patch_dropout to 0"
            )
        self.rate = rate
        self.num_class_tokens = int(family.class_token)
        self._embeddings: nn.Module = tower.embeddings
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to drop."""
        self._hook = self._embeddings.register_forward_hook(self._drop)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops dropping."""
        if self._hook is not None:
            self._hook.remove()

    def _drop(self, module: nn.Module, args: Any, embeddings_BSD: Tensor) -> Tensor:
        if not module.training:
            return embeddings_BSD
        return drop_patches(embeddings_BSD, self.rate, num_class_tokens=self.num_class_tokens)
