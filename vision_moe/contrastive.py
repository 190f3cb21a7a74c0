"""Contrastive losses over the batch of all ranks: InfoNCE, CLIP's, and the pairwise sigmoid loss, SigLIP's.

Shapes: B pairs of this rank, G = world_size * B pairs of all ranks, D embedding dim, R rows of a tile.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_moe.distributed import gather, gather_with_grad, mean_over_ranks, rank
from vision_moe.tiled_info_nce import tiled_info_nce


def contrastive_loss(
    image_embeds_BD: Tensor,
    text_embeds_BD: Tensor,
    logit_scale: Tensor,
    *,
    groups_B: Tensor | None = None,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE: mean of the image-to-text and the text-to-image cross-entropy over the global batch's pairs.

    Radford et al. 2021, fig. 3; CLIP-MoE v3, eq. 1.

    Each rank compares its own rows with the columns of all ranks, gathered with gradient. The value is that
    of the whole global batch on every rank; gradients averaged over ranks, as DistributedDataParallel does,
    are those of one process that holds the whole batch.

    Args:
        image_embeds_BD: float[B, D], rows of length 1; B is the same on every rank.
        text_embeds_BD: float[B, D], rows of length 1; row i belongs to image i.
        logit_scale: scalar, the inverse temperature itself (already exponentiated).
        groups_B: int[B]; pairs of different group are no negatives of each other. None: all others are.
        label_smoothing: share of the target spread over all candidates of a row, its own pair included.
        tile: rows whose logits are held at a time, for the same loss in less memory; None holds all B x G.

    Returns:
        float32 scalar.

    Raises:
        ValueError: shapes differ, label_smoothing is outside [0, 1), or tile is not positive.
    """
    _validate(image_embeds_BD, text_embeds_BD, groups_B, label_smoothing, tile)
    # Logits reach 100; bfloat16 would round them to steps of 0.5.
    with torch.autocast(image_embeds_BD.device.type, enabled=False):
        image_BD, text_BD, scale = image_embeds_BD.float(), text_embeds_BD.float(), logit_scale.float()
        text_GD = gather_with_grad(text_BD)
        if tile is not None:
            loss = tiled_info_nce(image_BD, text_GD, scale, groups_B, label_smoothing, tile)
        else:
            image_GD = gather_with_grad(image_BD)
            is_candidate_BG = None if groups_B is None else groups_B[:, None] == gather(groups_B)[None, :]
            targets_B = torch.arange(len(image_BD), device=image_BD.device) + rank() * len(image_BD)
            per_image_B = _cross_entropy(scale * image_BD @ text_GD.T, targets_B, is_candidate_BG, label_smoothing)
            per_text_B = _cross_entropy(scale * text_BD @ image_GD.T, targets_B, is_candidate_BG, label_smoothing)
            loss = (per_image_B.mean() + per_text_B.mean()) / 2
    # This rank's gradient, the global batch's value.
    return loss + (mean_over_ranks(loss) - loss.detach())


def sigmoid_loss(
    image_embeds_BD: Tensor,
    text_embeds_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    groups_B: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Pairwise sigmoid loss, -1/G sum_i sum_j log sigmoid(z_ij (t x_i y_j + b)) (Zhai et al. 2023, section 3.2).

    z_ij is 1 for a pair and -1 for every other image and text of the global batch. Value and gradients over
    ranks are as in `contrastive_loss`.

    Args:
        image_embeds_BD: float[B, D], rows of length 1; B is the same on every rank.
        text_embeds_BD: float[B, D], rows of length 1; row i belongs to image i.
        logit_scale: t, one value, the inverse temperature itself (already exponentiated).
        logit_bias: b, one value.
        groups_B: int[B]; images and texts of different group are not compared. None: all are.
        tile: rows whose logits are held at a time, made again in the backward pass; None holds all B x G.

    Returns:
        float32 scalar.

    Raises:
        ValueError: shapes differ, or tile is not positive.
    """
    _validate(image_embeds_BD, text_embeds_BD, groups_B, 0.0, tile)
    with torch.autocast(image_embeds_BD.device.type, enabled=False):
        image_BD, text_BD = image_embeds_BD.float(), text_embeds_BD.float()
        # The gathered side alone: it carries the gradient of all ranks' images to this rank's texts.
        text_GD = gather_with_grad(text_BD)
        groups_G = None if groups_B is None else gather(groups_B)
        sums = []
        for first in range(0, len(image_BD), tile or len(image_BD)):
            rows = slice(first, first + (tile or len(image_BD)))
            groups = None if groups_B is None or groups_G is None else (groups_B[rows], groups_G)
            own_column = rank() * len(image_BD) + first
            arguments = (image_BD[rows], text_GD, logit_scale.float(), logit_bias.float(), groups, own_column)
            sums.append(
                _pairwise_sum(*arguments)
                if tile is None
                else checkpoint(_pairwise_sum, *arguments, use_reentrant=False)
            )
        loss = torch.stack(sums).sum() / len(image_BD)
    return loss + (mean_over_ranks(loss) - loss.detach())


def _pairwise_sum(
    image_RD: Tensor,
    text_GD: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    own_column: int,
) -> Tensor:
    """Sum of the terms of R images, the first of which has its text in `own_column`; groups int[R] and int[G]."""
    logits_RG = scale * image_RD @ text_GD.T + bias
    signs_RG = torch.full_like(logits_RG, -1.0)
    signs_RG.diagonal(offset=own_column).fill_(1.0)
    terms_RG = -torch.nn.functional.logsigmoid(signs_RG * logits_RG)
    if groups is not None:
        terms_RG = terms_RG.masked_fill(groups[0][:, None] != groups[1], 0.0)
    return terms_RG.sum()


def _cross_entropy(
    logits_BG: Tensor, targets_B: Tensor, is_candidate_BG: Tensor | None, label_smoothing: float
) -> Tensor:
    """Smoothed cross-entropy of each row over its candidates; torch's own is inf where a class is masked."""
    if is_candidate_BG is None:
        return torch.nn.functional.cross_entropy(
            logits_BG, targets_B, label_smoothing=label_smoothing, reduction="none"
        )
    log_probs_BG = logits_BG.masked_fill(~is_candidate_BG, float("-inf")).log_softmax(dim=-1)
    target_B = -log_probs_BG.gather(1, targets_B[:, None]).squeeze(1)
    if label_smoothing == 0.0:
        return target_B
    spread_B = -log_probs_BG.masked_fill(~is_candidate_BG, 0.0).sum(dim=-1) / is_candidate_BG.sum(dim=-1)
    return (1 - label_smoothing) * target_B + label_smoothing * spread_B


def _validate(
    image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None, label_smoothing: float, tile: int | None
) -> None:
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape or len(image_BD) == 0:
        raise ValueError(
            "image and text embeddings must have one shape [B, D] with B > 0, but got "
            f"{tuple(image_BD.shape)} and {tuple(text_BD.shape)}"
        )
    if groups_B is not None and groups_B.shape != image_BD.shape[:1]:
        raise ValueError(f"groups_B must have shape [{len(image_BD)}], but got {tuple(groups_B.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), but got {label_smoothing}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be positive, or None for no tiles, but got {tile}")
