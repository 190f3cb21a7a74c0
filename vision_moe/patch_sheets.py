"""The patches that each expert took with the highest score over a data set, as contact sheets: one a MoE block.

Shapes: B pictures, P patches of a picture, E experts, N patches kept per expert.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vision_moe.embedding import Pictures
from vision_moe.files import replacing
from vision_moe.plots import COLORS
from vision_moe.routing_trace import Visit

# A patch alone says little: so many patches around it are shown on each side, and the patch is framed.
_CONTEXT = 2
_TILE = 96
_LABEL = 24


class TopPatch(NamedTuple):
    """One patch of a picture.

    score: the expert's among all, in [0, 1]; picture: its position in the data set; patch: row by row from 0.
    """

    score: float
    picture: int
    patch: int


class TopPatches:
    """Keeps the best patches of every expert, at most one a picture; a visitor of `vision_moe.routing_trace.trace`.

    Args:
        num_patches: P of a picture; tokens before the last P (class token, registers) are left out.
        num_kept: N.
    """

    def __init__(self, num_patches: int, num_kept: int) -> None:
        self._num_patches = num_patches
        self._num_kept = num_kept
        self._best: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, visit: Visit) -> None:
        if visit.modality != "vision":
            return
        num_pictures, num_experts = len(visit.index_B), visit.routed.gates_TE.shape[-1]
        if len(visit.token_V) % num_pictures or len(visit.token_V) < num_pictures * self._num_patches:
            raise ValueError(
                f"{len(visit.token_V)} tokens of {num_pictures} pictures are not {self._num_patches} patches each and "
                "as many other tokens; top patches need pictures of one size"
            )
        taken_VE = (visit.experts_VK[:, :, None] == torch.arange(num_experts, device=visit.experts_VK.device)).any(1)
        scores_VE = visit.routed.gates_TE.masked_fill(~taken_VE, -1.0)
        scores_BPE = scores_VE.view(num_pictures, -1, num_experts)[:, -self._num_patches :]
        scores_BE, patch_BE = (values.cpu() for values in scores_BPE.max(dim=1))
        index_BE = visit.index_B[:, None].expand_as(scores_BE)
        new = (scores_BE, index_BE, patch_BE)
        old = self._best.get(visit.block)
        scores, index, patch = new if old is None else (torch.cat(pair) for pair in zip(old, new, strict=True))
        # Stable: of equal scores the first picture stays.
        order = scores.sort(dim=0, descending=True, stable=True).indices[: self._num_kept]
        self._best[visit.block] = scores.gather(0, order), index.gather(0, order), patch.gather(0, order)

    def blocks(self) -> dict[int, list[list[TopPatch]]]:
        """By block and expert, best first; an expert that took no patch has none."""
        return {
            block: [
                [TopPatch(*found) for found in zip(*(of.tolist() for of in columns), strict=True) if found[0] >= 0]
                for columns in zip(*(of.unbind(dim=1) for of in best), strict=True)
            ]
            for block, best in sorted(self._best.items())
        }


def unnormalized(pixel_values_3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A processor's output as a picture again."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    pixels = (pixel_values_3HW.float().cpu() * scale + shift).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def crop(picture: Image.Image, patch: int, grid: tuple[int, int]) -> Image.Image:
    """A patch with what is around it, framed.

    Args:
        picture: what the tower saw, a whole number of pixels a patch.
        patch: row by row from 0.
        grid: (H, W) patches.
    """
    row, column = divmod(patch, grid[1])
    height, width = picture.height // grid[0], picture.width // grid[1]
    top, left = (row - _CONTEXT) * height, (column - _CONTEXT) * width
    side = 2 * _CONTEXT + 1
    # Beyond the edge a crop is black.
    tile = picture.crop((left, top, left + side * width, top + side * height)).resize((_TILE, _TILE))
    start, stop = _CONTEXT * _TILE // side, (_CONTEXT + 1) * _TILE // side
    ImageDraw.Draw(tile).rectangle((start - 1, start - 1, stop, stop), outline=COLORS[6])
    return tile


def write_sheet(
    experts: Sequence[Sequence[TopPatch]], dataset: Pictures, image_processor: Any, grid: tuple[int, int], output: Path
) -> None:
    """Writes a PNG: a row an expert, its best patches from left to right.

    Args:
        experts: of one block, from `TopPatches.blocks`.
        dataset: the pictures that they index.
        image_processor: of the model.
        grid: (H, W) patches.
        output: PNG to write.
    """
    columns = max(1, *(len(found) for found in experts))
    sheet = Image.new("RGB", (_LABEL + columns * (_TILE + 2), len(experts) * (_TILE + 2)), "white")
    for row, found in enumerate(experts):
        top = row * (_TILE + 2)
        ImageDraw.Draw(sheet).text((4, top + _TILE // 2 - 6), str(row), fill="black")
        for column, patch in enumerate(found):
            image = dataset[patch.picture]["image"]
            pixels_3HW = image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
            seen = unnormalized(pixels_3HW, image_processor.image_mean, image_processor.image_std)
            sheet.paste(crop(seen, patch.patch, grid), (_LABEL + column * (_TILE + 2), top))
    with replacing(output) as temporary:
        sheet.save(temporary, format="PNG")
