"""Longer text: CLIP's 77 position embeddings stretched as Long-CLIP does (Zhang et al. 2024, arXiv:2403.15378).

P positions, D model dim.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPModel

_KEPT = 20
_RATIO = 4


def stretch_positions(positions_PD: Tensor) -> Tensor:
    """Keeps the first 20 rows, which training has seen most, and interpolates the others by a factor of 4.

    Row 20 + 4 i + r is (1 - r/4) p[20 + i] + (r/4) p[21 + i]; the last four rows extrapolate from the last one.

    Args:
        positions_PD: float[P, D] with P > 20.

    Returns:
        float[20 + 4 (P - 20), D]: 248 rows from 77.

    Raises:
        ValueError: if there are too few rows.
    """
    num_positions = len(positions_PD)
    if num_positions <= _KEPT:
        raise ValueError(f"stretching keeps the first {_KEPT} positions and needs more, but got {num_positions}")
    tail_PD = positions_PD[_KEPT:]
    # One row more at the end, so that the last gap is filled by the same formula: p[last] + (p[last] - p[last - 1]).
    beyond_1D = 2 * positions_PD[-1:] - positions_PD[-2:-1]
    next_PD = torch.cat([tail_PD[1:], beyond_1D])
    share_R11 = (torch.arange(_RATIO, dtype=positions_PD.dtype, device=positions_PD.device) / _RATIO)[:, None, None]
    filled_RPD = (1 - share_R11) * tail_PD + share_R11 * next_PD
    return torch.cat([positions_PD[:_KEPT], filled_RPD.transpose(0, 1).flatten(0, 1)])


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
