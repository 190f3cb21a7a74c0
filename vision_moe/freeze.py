"""Which parameters a stage trains."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vision_moe.model.families import ENCODER_BY_TYPE, TOWERS, tower_family
from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.router import Router

PARTS = ("all", "text", "ffn", "router", "projections")


def set_trainable(model: nn.Module, part: str) -> dict[str, int]:
    """Makes one part of a model trainable and freezes the rest.

    Args:
        model: a dual encoder of vision_moe.model.families, dense or a mixture, or a model that holds one.
        part: "all", without parameters that contrastive training never reaches (DINOv2's mask token); "text": all but
            the image tower (locked-image tuning, LiT); "ffn": the MLPs and experts of both towers' blocks, and nothing
            else (a stage of MCL); "router": the routers (the last stage of CLIP-MoE); "projections": what lies between
            the towers and the common space, CLIP's two linear maps, and with them the poolers of a
            VisionTextDualEncoderModel.

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
    chosen -= {id(parameter) for parameter in _unused(model)}
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
    elif part == "router":
        yield from (module for module in model.modules() if isinstance(module, Router))
    for encoder in _encoders(model):
        if part == "text":
            yield encoder.vision_model
        elif part == "projections":
            heads = set(ENCODER_BY_TYPE[encoder.config.model_type].heads)
            yield from (module for name, module in encoder.named_modules() if name in heads)
        elif part == "ffn":
            for tower in TOWERS:
                yield from _mlps(getattr(encoder, f"{tower}_model"))


def _mlps(tower: Any) -> Iterator[nn.Module]:
    """Experts of a tower, and both linear layers of its dense blocks."""
    family = tower_family(tower.config)
    for block in tower.get_submodule(family.blocks):
        experts = [module for module in block.modules() if isinstance(module, Experts | SharedExpert)]
        yield from experts or (block.get_submodule(family.fc1), block.get_submodule(family.fc2))


def _unused(model: nn.Module) -> Iterator[nn.Parameter]:
    for encoder in _encoders(model):
        for tower in TOWERS:
            module = getattr(encoder, f"{tower}_model")
            parameters = dict(module.named_parameters())
            yield from (parameters[name] for name in tower_family(module.config).unused if name in parameters)


def _encoders(model: nn.Module) -> list[Any]:
    """The dual encoders of the table in a model, itself included."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [module for module in models if module.config.model_type in ENCODER_BY_TYPE]
