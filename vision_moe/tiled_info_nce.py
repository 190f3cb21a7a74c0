"""InfoNCE in tiles of rows, exact and without the matrix of logits (cf. Inf-CL, Cheng et al. 2024, arXiv:2410.17243).

A tile's logits, one product, serve both directions: its rows are complete, and the sums over its columns are completed
over tiles and ranks. The backward pass makes each tile again: four products of B x G x D in all, where the plain form
takes six and keeps two matrices of logits with their gradients.

B pairs of this rank, G pairs of all ranks, D embedding dim, R rows of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vision_moe.distributed import gather, rank


def tiled_info_nce(
    image_BD: Tensor, text_GD: Tensor, scale: Tensor, groups_B: Tensor | None, label_smoothing: float, tile: int
) -> Tensor:
    """This rank's share of the symmetric InfoNCE: its mean over ranks is the loss, and so with the gradients.

    Args:
        image_BD: float32[B, D], of this rank.
        text_GD: float32[G, D], gathered with gradient.
        scale: float32 scalar.
        groups_B: int[B]; pairs of different group are no negatives of each other. None: all others are.
        label_smoothing: as in `vision_moe.contrastive.contrastive_loss`.
        tile: R.

    Returns:
        float32 scalar.
    """
    loss: Tensor = _TiledInfoNCE.apply(image_BD, text_GD, scale, groups_B, label_smoothing, tile)
    return loss


class _TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_GD: Tensor,
        scale: Tensor,
        groups_B: Tensor | None,
        label_smoothing: float,
        tile: int,
    ) -> Tensor:
        tiles = _Tiles(image_BD, text_GD, scale, groups_B, label_smoothing, tile)
        lse_B = image_BD.new_empty(len(image_BD))
        columns_G = torch.full_like(text_GD[:, 0], float("-inf"))
        target = image_BD.new_zeros(())
        for rows, logits_RG, mask_RG in tiles:
            target += tiles.target_logits(rows, logits_RG, mask_RG).sum()
            if mask_RG is not None:
                logits_RG.masked_fill_(mask_RG, float("-inf"))
            lse_B[rows] = logits_RG.logsumexp(dim=1)
            columns_G = torch.logaddexp(columns_G, logits_RG.logsumexp(dim=0))
        # Every rank's part of the sum over a column.
        columns_G = gather(columns_G[None]).logsumexp(dim=0)
        own = slice(rank() * len(image_BD), (rank() + 1) * len(image_BD))
        ctx.save_for_backward(image_BD, text_GD, scale, groups_B, lse_B, columns_G)
        ctx.settings = label_smoothing, tile
        return ((lse_B.sum() + columns_G[own].sum()) / 2 - target) / len(image_BD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_GD, scale, groups_B, lse_B, columns_G = ctx.saved_tensors
        image_needed, text_needed, scale_needed = ctx.needs_input_grad[:3]
        tiles = _Tiles(image_BD, text_GD, scale, groups_B, *ctx.settings)
        # Gradients but for the factor scale * grad / B.
        dimage_BD, dtext_GD = torch.empty_like(image_BD), torch.zeros_like(text_GD)
        for rows, logits_RG, mask_RG in tiles:
            # Half the sum of both directions' softmax less the targets.
            slope_RG = (logits_RG - lse_B[rows, None]).exp_().add_(logits_RG.sub_(columns_G).exp_()).mul_(0.5)
            tiles.subtract_targets(rows, slope_RG, mask_RG)
            if image_needed or scale_needed:
                torch.mm(slope_RG, text_GD, out=dimage_BD[rows])
            if text_needed:
                dtext_GD.addmm_(slope_RG.t(), image_BD[rows])
        factor = grad / len(image_BD)
        # d loss / d scale = sum_ij slope_ij <image_i, text_j>.
        dscale = (dimage_BD * image_BD).sum().mul(factor).view_as(scale) if scale_needed else None
        return (
            dimage_BD.mul_(factor * scale) if image_needed else None,
            dtext_GD.mul_(factor * scale) if text_needed else None,
            dscale,
            None,
            None,
            None,
        )


class _Tiles:
    """The logits of all pairs of an image of this rank and a text of any rank, R images at a time."""

    def __init__(
        self,
        image_BD: Tensor,
        text_GD: Tensor,
        scale: Tensor,
        groups_B: Tensor | None,
        label_smoothing: float,
        tile: int,
    ) -> None:
        self.image_BD, self.text_GD, self.scale = image_BD, text_GD, scale
        self.groups_B, self.groups_G = groups_B, None if groups_B is None else gather(groups_B)
        self.label_smoothing, self.tile = label_smoothing, tile

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The rows of each tile, float32[R, G] to overwrite, and bool[R, G], True where there is no candidate."""
        for start in range(0, len(self.image_BD), self.tile):
            rows = slice(start, min(start + self.tile, len(self.image_BD)))
            mask_RG = None
            if self.groups_B is not None and self.groups_G is not None:
                mask_RG = self.groups_B[rows, None] != self.groups_G
            yield rows, (self.image_BD[rows] * self.scale) @ self.text_GD.T, mask_RG

    def _own_column(self, rows: slice) -> int:
        """Column of the first row's own text; the following rows' follow."""
        return rank() * len(self.image_BD) + rows.start

    def _candidates(self, mask_RG: Tensor | None) -> Tensor | int:
        return len(self.text_GD) if mask_RG is None else (~mask_RG).sum(dim=1)

    def target_logits(self, rows: slice, logits_RG: Tensor, mask_RG: Tensor | None) -> Tensor:
        """float32[R], the mean of each row's logits under its target."""
        own_R = logits_RG.diagonal(self._own_column(rows))
        if self.label_smoothing == 0:
            return own_R
        sum_R = logits_RG.sum(dim=1) if mask_RG is None else logits_RG.masked_fill(mask_RG, 0.0).sum(dim=1)
        return own_R.lerp(sum_R / self._candidates(mask_RG), self.label_smoothing)

    def subtract_targets(self, rows: slice, slope_RG: Tensor, mask_RG: Tensor | None) -> None:
        """Takes the targets from what has both directions' probabilities; they are the same in both directions."""
        if self.label_smoothing:
            share = self.label_smoothing / self._candidates(mask_RG)
            slope_RG -= share[:, None] if isinstance(share, Tensor) else share
        slope_RG.diagonal(self._own_column(rows)).sub_(1 - self.label_smoothing)
        if mask_RG is not None:
            slope_RG.masked_fill_(mask_RG, 0.0)
