"""LoRA inside LLaVA (Hu et al. 2021, arXiv:2106.09685): on the language model, whole or quantised, and on the tower.

The adapters are injected into the model, which stays the class that it is: the Trainer, DeepSpeed and the parts that
train in full beside them need no special case.
"""

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.stage_recipe import LoraSettings
from vision_moe.moe.experts import Experts, SharedExpert
from vision_moe.moe.router import Router

# peft's name for an adapter that was given none.
ADAPTER_NAME = "default"
# Their linear layers are parts of their own, or are read past their forward pass.
_LEFT_ALONE = (Router, Experts, SharedExpert, nn.MultiheadAttention)


def add_lora(model: PreTrainedModel, settings: LoraSettings, *, llm: bool = True, tower: bool = False) -> None:
    """Puts adapters beside linear layers of a LLaVA and freezes everything else.

    B starts at 0, so nothing changes yet.

    Args:
        model: LLaVA.
        settings: of all adapters.
        llm: whether the language model's layers get one; its head never does.
        tower: whether the vision tower's do, outside its routers and experts.
    """
    inner, targets = model.model, []
    # Whole names, which other parts' layers cannot share.
    if llm:
        targets += [f"model.language_model.{name}" for name in _linear_layers(inner.language_model)]
    if tower:
        targets += [f"model.vision_tower.{name}" for name in _linear_layers(inner.vision_tower)]
    model.add_adapter(
        LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none", target_modules=targets
        )
    )


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + (alpha / r) B A, added in float32 (Hu et al., section 4.1).

    Args:
        weight: W, float[out, in].
        down: A, float[r, in].
        up: B, float[out, r].
        scale: alpha / r.

    Returns:
        float[out, in] in the dtype of `weight`.
    """
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of a model with adapters, merged, by the names that they have without adapters.

    Args:
        state: its `state_dict()`, or a part of it that has all of an adapter or nothing.
        scale: alpha / r.
    """
    merged = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            down, up = (state[f"{stem}.lora_{matrix}.{ADAPTER_NAME}.weight"] for matrix in "AB")
            merged[f"{stem}.weight"] = merged_weight(tensor, down, up, scale)
        elif ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _linear_layers(part: nn.Module) -> list[str]:
    alone = {id(layer) for module in part.modules() if isinstance(module, _LEFT_ALONE) for layer in module.modules()}
    return [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear) and id(layer) not in alone]
