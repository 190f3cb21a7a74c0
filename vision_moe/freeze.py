"""Which parameters a stage trains."""

from collections.abc import Iterator

from torch import nn
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPMLP

from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.router import Router

PARTS = ("all", "text", "ffn", "router", "projections")


def set_trainable(model: nn.Module, part: str) -> dict[str, int]:
    """Makes one part of a model trainable and freezes the rest.

    Args:
        model: a dense CLIP or a CLIP-MoE, or a model that holds one.
        part: "all"; "text": all but the image tower (locked-image tuning, LiT); "ffn": every MLP and expert of both
            towers, and nothing else (a stage of MCL); "router": the routers (the last stage of CLIP-MoE);
            "projections": the two linear maps into the common space.

    Returns:
        numbers of parameters under "trainable" and "frozen".

    Raises:
        ValueError: if the part is unknown, or the model has no such part.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; choose one of: {', '.join(PARTS)}")
    chosen = {id(parameter) for module in _modules(model, part) for parameter in module.parameters()}
    if part == "text":
        chosen = {id(parameter) for parameter in model.parameters()} - chosen
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no parameters in part {part!r}")
    counts = {"trainable": 0, "frozen": 0}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        counts["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def _modules(model: nn.Module, part: str) -> Iterator[nn.Module]:
    """The modules whose parameters make up the part; for "text", those that it leaves out."""
    if part == "all":
        yield model
        return
    for module in model.modules():
        if (part == "ffn" and isinstance(module, CLIPMLP | Experts | SharedExpert)) or (
            part == "router" and isinstance(module, Router)
        ):
            yield module
        elif part == "text" and isinstance(module, CLIPModel):
            yield module.vision_model
        elif part == "projections" and isinstance(module, CLIPModel):
            yield module.visual_projection
            yield module.text_projection
