"""The parts of a LLaVA model, and which of their parameters train in a stage.

"tower" is the vision tower without its routers and experts, which are parts of their own; a dense tower has none.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from mllm.lora import add_lora
from mllm.stage_recipe import StageConfig
from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.router import Router

PARTS = ("projector", "llm", "tower", "routers", "experts")


def named_parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All parameters of a LLaVA model with their full names, by part; each parameter once.

    Raises:
        ValueError: a parameter belongs to no part.
    """
    inner = model.model
    owner = {id(p): "projector" for p in inner.multi_modal_projector.parameters()}
    owner |= {id(p): "tower" for p in inner.vision_tower.parameters()}
    for part, kinds in (("routers", Router), ("experts", Experts | SharedExpert)):
        modules = (module for module in inner.vision_tower.modules() if isinstance(module, kinds))
        owner |= {id(p): part for module in modules for p in module.parameters()}
    owner |= {id(p): "llm" for p in _llm_parameters(model)}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            raise ValueError(f"parameter {name} belongs to neither {', '.join(PARTS)}")
        parts[owner[id(parameter)]].append((name, parameter))
    return parts


def set_trainable(model: PreTrainedModel, stage: StageConfig) -> dict[str, dict[str, int]]:
    """Freezes and frees the parts as the stage says; adds adapters where it says lora.

    Returns:
        For each part that the model has the numbers of trained and of all parameters, ZeRO-3's partitioned ones counted
        whole.

    Raises:
        ValueError: the stage wants to train routers or experts of a dense tower.
    """
    if stage.has_lora:
        add_lora(model, stage.lora, llm=stage.llm == "lora", tower=stage.tower == "lora")
    for part, parameters in named_parts(model).items():
        mode = stage.modes[part]
        if not parameters and part in ("routers", "experts") and getattr(stage, part) == "full":
            raise ValueError(f"{part} cannot train: the vision tower is dense; take a CLIP-MoE, or leave the field out")
        # A part with adapters is as add_lora left it.
        for _, parameter in parameters if mode != "lora" else ():
            parameter.requires_grad_(mode == "full")
    return {
        part: {
            "trained": sum(num_elements(p) for _, p in parameters if p.requires_grad),
            "all": sum(num_elements(p) for _, p in parameters),
        }
        for part, parameters in named_parts(model).items()
        if parameters
    }


def num_elements(parameter: nn.Parameter) -> int:
    """Size of a parameter, also of one that ZeRO-3 holds in pieces (its own numel is then 0)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _llm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from model.model.language_model.parameters()
    yield from model.lm_head.parameters()
