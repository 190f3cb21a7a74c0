"""Longer text and other picture sizes: CLIP's position embeddings, stretched and interpolated.

P positions, D model dim, G patches per side.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPModel

NUM_KEPT = 20
_RATIO = 4


def stretch_positions(positions_PD: Tensor) -> Tensor:
    """Long-CLIP's stretching of CLIP's 77 text positions (Zhang et al. 2024, arXiv:2403.15378, section 3.1).

    It keeps the first 20 rows, which training has seen most, and interpolates the others by a factor of 4.

    Row 20 + 4 i + r is (1 - r/4) p[20 + i] + (r/4) p[21 + i]; the last four rows extrapolate from the last one.

    Args:
        positions_PD: float[P, D] with P > 20.

    Returns:
        float[20 + 4 (P - 20), D]: 248 rows from 77.

    Raises:
        ValueError: if there are too few rows.
    """
    num_positions = len(positions_PD)
    if num_positions <= NUM_KEPT:
        raise ValueError(f"stretching keeps the first {NUM_KEPT} positions and needs more, but got {num_positions}")
    tail_PD = positions_PD[NUM_KEPT:]
    share_R11 = (torch.arange(_RATIO, dtype=positions_PD.dtype, device=positions_PD.device) / _RATIO)[:, None, None]
    between_RPD = (1 - share_R11) * tail_PD[:-1] + share_R11 * tail_PD[1:]
    beyond_R1D = positions_PD[-1:] + share_R11 * (positions_PD[-1:] - positions_PD[-2:-1])
    filled_RPD = torch.cat([between_RPD, beyond_R1D], dim=1)
    return torch.cat([positions_PD[:NUM_KEPT], filled_RPD.transpose(0, 1).flatten(0, 1)])


def stretch_text(model: CLIPModel, text_positions: int) -> CLIPModel:
    """Gives a CLIP's text tower `text_positions` positions, in place.

    Raises:
        ValueError: if stretching the tower's own positions does not give that number.
    """
    config = model.config.text_config
    if config.max_position_embeddings == text_positions:
        return model
    embeddings = model.text_model.embeddings
    stretched_PD = stretch_positions(embeddings.position_embedding.weight.detach())
    if len(stretched_PD) != text_positions:
        raise ValueError(
            f"text_positions must be {config.max_position_embeddings} (as it is) or {len(stretched_PD)} (stretched), "
            f"but got {text_positions}"
        )
    embeddings.position_embedding = nn.Embedding.from_pretrained(stretched_PD, freeze=False)
    embeddings.register_buffer(
        "position_ids", torch.arange(text_positions, device=stretched_PD.device)[None], persistent=False
    )
    config.max_position_embeddings = text_positions
    return model


def interpolate_positions(positions_PD: Tensor, num_patches: int) -> Tensor:
    """Image positions of another resolution, as transformers' `interpolate_pos_encoding` and DINO compute them.

    Row 0, the class token's, is kept. The others are the pixels of a G x G picture with D channels, resized by cubic
    convolution (Keys 1981, a = -0.75) without antialiasing: the new row i reads at (i + 1/2) G / G' - 1/2, and rows
    beyond the border are the border's.

    Args:
        positions_PD: float[1 + G * G, D], row by row.
        num_patches: G', patches per side.

    Returns:
        float[1 + G' * G', D] in the same dtype.

    Raises:
        ValueError: the positions are not those of a square and a class token.
    """
    side = round(max(0, len(positions_PD) - 1) ** 0.5)
    if side < 1 or 1 + side * side != len(positions_PD):
        raise ValueError(f"image positions must be 1 + a square number of rows, but got {len(positions_PD)}")
    grid_1DGG = positions_PD[1:].T.unflatten(1, (side, side))[None].float()
    resized_1DGG = nn.functional.interpolate(grid_1DGG, (num_patches, num_patches), mode="bicubic", align_corners=False)
    return torch.cat([positions_PD[:1], resized_1DGG[0].flatten(1).T.to(positions_PD.dtype)])


def resize_image(model: CLIPModel, image_size: int) -> CLIPModel:
    """Makes a CLIP take pictures of another size, in place: its image positions are interpolated.

    Args:
        model: dense CLIP or CLIP-MoE.
        image_size: pixels per side, a multiple of the patch size.

    Raises:
        ValueError: the size does not fit the patches.
    """
    embeddings = model.vision_model.embeddings
    if image_size == embeddings.image_size:
        return model
    if image_size < 1 or image_size % embeddings.patch_size:
        raise ValueError(
            f"image_size must be a multiple of the patch size {embeddings.patch_size}, but got {image_size}"
        )
    num_patches = image_size // embeddings.patch_size
    resized_PD = interpolate_positions(embeddings.position_embedding.weight.detach(), num_patches)
    embeddings.position_embedding = nn.Embedding.from_pretrained(resized_PD, freeze=False)
    embeddings.register_buffer(
        "position_ids", torch.arange(len(resized_PD), device=resized_PD.device)[None], persistent=False
    )
    embeddings.image_size, embeddings.num_patches = image_size, num_patches**2
    embeddings.num_positions = len(resized_PD)
    for config in (model.config.vision_config, model.vision_model.config, embeddings.config):
        config.image_size = image_size
    return model
