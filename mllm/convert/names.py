"""LLaVA's names of weights and those of our parts."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

PROJECTOR_PREFIX = "model.mm_projector."
# Position of each linear layer in LLaVA's nn.Sequential; the activation between them is its layer 1.
_PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}
_TOWER = re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(?P<name>.+)")
# What PEFT puts before the names of a model that it has wrapped.
_PEFT_PREFIX = "base_model.model."
# Tables that older transformers saved and that follow from the config.
_COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|position_ids)")


class LlavaParts(NamedTuple):
    """A LLaVA state dict by part.

    Attributes:
        llm: names of a transformers causal language model ("model.layers...", "lm_head.weight").
        projector: names of transformers' LlavaMultiModalProjector.
        tower: names of transformers' CLIPVisionModel; empty where LLaVA keeps the tower elsewhere.
    """

    llm: dict[str, Tensor]
    projector: dict[str, Tensor]
    tower: dict[str, Tensor]


def without_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LLaVA's weights without the prefix that training with an adapter leaves before their names."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state.items()}


def split_parts(state: Mapping[str, Tensor]) -> LlavaParts:
    """Sorts LLaVA's weights into parts under our names; those that no part knows stay under `llm`, to be refused there.

    Args:
        state: LLaVA's names.
    """
    parts = LlavaParts({}, {}, {})
    for name, tensor in state.items():
        tower = _TOWER.fullmatch(name)
        if _COMPUTED.fullmatch(name):
            continue
        if name.startswith(PROJECTOR_PREFIX):
            layer, _, kind = name.removeprefix(PROJECTOR_PREFIX).partition(".")
            parts.projector[f"{_PROJECTOR_LAYERS.get(layer, layer)}.{kind}"] = tensor
        elif tower is not None:
            parts.tower[tower["name"]] = tensor
        else:
            parts.llm[name] = tensor
    return parts


def projector_state(projector: nn.Module) -> dict[str, Tensor]:
    """A projector's weights under LLaVA's names."""
    state = projector.state_dict()
    return {
        f"{PROJECTOR_PREFIX}{number}.{kind}": state[f"{layer}.{kind}"]
        for number, layer in _PROJECTOR_LAYERS.items()
        for kind in ("weight", "bias")
    }


def check_fit(part: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compares names and shapes of weights with those that a part has.

    Raises:
        ValueError: some are missing, unexpected or of another shape; the message lists them.
    """
    shared = found.keys() & wanted.keys()
    reshaped = [
        f"{name} {tuple(found[name].shape)} in place of {tuple(wanted[name].shape)}"
        for name in shared
        if found[name].shape != wanted[name].shape
    ]
    refuse(part, missing=wanted.keys() - shared, unexpected=found.keys() - shared, reshaped=reshaped)


def refuse(part: str, *, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str]) -> None:
    """Raises a ValueError that lists what does not fit, if anything."""
    wrong = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": sorted(reshaped)}
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
    if told:
        raise ValueError(f"the weights of the {part} do not fit. {told}")
