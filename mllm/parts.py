"""The three parts of a LLaVA model, and which of their parameters train in a stage."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from mllm.lora import add_lora
from mllm.recipe import StageConfig

PARTS = ("projector", "llm", "tower")


def named_parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All parameters of a LLaVA model with their full names, by part; each parameter once.

    Raises:
        ValueError: a parameter belongs to no part.
    """
    inner = model.model
    owner = {id(p): "projector" for p in inner.multi_modal_projector.parameters()}
    owner |= {id(p): "tower" for p in inner.vision_tower.parameters()}
    owner |= {id(p): "llm" for p in _llm_parameters(model)}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            raise ValueError(f"parameter {name} belongs to neither {', '.join(PARTS)}")
        parts[owner[id(parameter)]].append((name, parameter))
    return parts


def set_trainable(model: PreTrainedModel, stage: StageConfig) -> dict[str, dict[str, int]]:
    """Freezes and frees the parts as the stage says; adds adapters for llm: lora.

    Returns:
        For each part the numbers of trained and of all parameters, ZeRO-3's partitioned ones counted whole.
    """
    modes = {"projector": stage.projector, "llm": stage.llm, "tower": stage.tower}
    if stage.llm == "lora":
        add_lora(model, stage.lora)
    for part, parameters in named_parts(model).items():
        # Under LoRA the language model is as add_lora left it.
        for _, parameter in parameters if modes[part] != "lora" else ():
            parameter.requires_grad_(modes[part] == "full")
    return {
        part: {
            "trained": sum(num_elements(p) for _, p in parameters if p.requires_grad),
            "all": sum(num_elements(p) for _, p in parameters),
        }
        for part, parameters in named_parts(model).items()
    }


def num_elements(parameter: nn.Parameter) -> int:
    """Size of a parameter, also of one that ZeRO-3 holds in pieces (its own numel is then 0)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _llm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from model.model.language_model.parameters()
    yield from model.lm_head.parameters()
