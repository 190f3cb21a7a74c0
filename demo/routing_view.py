"""Which expert took which patch or token, as numbers and pictures. Pure functions; nothing here knows Gradio.

Shapes: S tokens of the tower (class token first, then patches row by row), E experts, H x W patch grid; a sentence is a
grid of one row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vision_moe.moe.router import Router, expert_scores
from vision_moe.patch_sheets import unnormalized
from vision_moe.plots import COLORS


class Routing(NamedTuple):
    """The routing of one picture or sentence.

    Attributes:
        expert_maps: int[H, W] per layer, the first choice of each patch.
        gate_maps: float[H, W] per layer, the gate of that choice, in [0, 1].
        num_experts: E.
        picture: what the tower saw: cropped, padded and resized as its processor does; None for a sentence.
        words: the W tokens of a sentence.
    """

    expert_maps: tuple[NDArray[np.int64], ...]
    gate_maps: tuple[NDArray[np.float32], ...]
    num_experts: int
    picture: Image.Image | None = None
    words: tuple[str, ...] = ()


def first_choice(
    router_logits_SE: torch.Tensor, grid: tuple[int, int], router: Router | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """First choice of each patch, and its gate: the score of that expert among all.

    With expert choice it is the expert that a patch prefers, whether or not that expert took it.

    Args:
        router_logits_SE: float[S, E]; tokens before the last H * W (class token, registers) are left out.
        grid: (H, W), patches per column and per row.
        router: what turns the logits into scores and a choice; None = a softmax, and the largest.

    Returns:
        int64[H, W] experts and float32[H, W] gates.

    Raises:
        ValueError: if there are fewer tokens than patches.
    """
    num_tokens, num_patches = router_logits_SE.shape[0], grid[0] * grid[1]
    if num_tokens < num_patches:
        raise ValueError(
            f"router logits of {num_tokens} tokens cannot fill a grid of {grid[0]} x {grid[1]} patches;"
            " pass those of a whole picture"
        )
    logits_PE = router_logits_SE[num_tokens - num_patches :].float()
    scores_PE = expert_scores(logits_PE, "softmax" if router is None else router.scoring_func)
    bias_E = None if router is None or router.choice_bias is None else router.choice_bias.to(scores_PE.device)
    experts_P = (scores_PE if bias_E is None else scores_PE + bias_E).argmax(dim=-1)
    gates_P = scores_PE.gather(-1, experts_P[:, None])[:, 0]
    return experts_P.reshape(grid).cpu().numpy(), gates_P.reshape(grid).cpu().numpy()


def route(
    router_logits: Sequence[torch.Tensor],
    grid: tuple[int, int],
    routers: Sequence[Router] | None = None,
    *,
    picture: Image.Image | None = None,
    words: tuple[str, ...] = (),
) -> Routing:
    """Gathers the first choices of all layers.

    Args:
        router_logits: float[S, E] per layer, at least one.
        grid: (H, W) patches.
        routers: of the layers, see `first_choice`.
        picture: what the tower saw.
        words: the tokens of a sentence.
    """
    of = routers if routers is not None else [None] * len(router_logits)
    choices = [first_choice(logits_SE, grid, router) for logits_SE, router in zip(router_logits, of, strict=True)]
    return Routing(
        expert_maps=tuple(experts for experts, _ in choices),
        gate_maps=tuple(gates for _, gates in choices),
        num_experts=router_logits[0].shape[-1],
        picture=picture,
        words=words,
    )


def palette(num_experts: int) -> list[str]:
    """One fixed color per expert, as in CSS; from the ninth expert on, the eight colors return lighter."""
    base = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS], dtype=np.float64)
    experts = np.arange(num_experts)
    rounds = -(-num_experts // len(COLORS))
    white = (0.75 * (experts // len(COLORS)) / max(rounds, 1))[:, None]
    colors = np.rint(base[experts % len(COLORS)] * (1 - white) + 255 * white).astype(int)
    return ["#" + "".join(f"{channel:02x}" for channel in color) for color in colors]


def shares(expert_map_HW: NDArray[np.int64], num_experts: int) -> NDArray[np.float64]:
    """Share of the patches whose first choice is each expert: float[E], sums to 1."""
    return np.bincount(expert_map_HW.ravel(), minlength=num_experts) / expert_map_HW.size


def seen_picture(
    pixel_values_3HW: torch.Tensor, mean: list[float], std: list[float], min_side: int = 448
) -> Image.Image:
    """The processor's output as a picture again, enlarged by a whole factor to at least `min_side` pixels."""
    picture = unnormalized(pixel_values_3HW, mean, std)
    factor = -(-min_side // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
