"""A fingerprint of the vision tower in a LLaVA's config, checked when the model is loaded.

Projector and language model are trained on the features of one tower. A folder in which another tower has come to lie
loads without a missing weight and answers nonsense; the fingerprint, written where a model is assembled or trained and
left alone by `save_pretrained`, tells.

It is a hash of the signs of all weights, which no change of their precision flips, and not of their names, which
transformers may change. Another tower, or one that was trained on, differs in many signs; single bits of a file's
damage may go unseen.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FIELD = "vision_tower_fingerprint"
_TOWER = "model.vision_tower."


def fingerprint(weights: Iterable[Tensor]) -> str:
    """SHA-256 over shapes and signs, in whatever order the weights come and of whatever floating dtype they are."""
    return hashlib.sha256("\n".join(sorted(_signs(tensor) for tensor in weights)).encode()).hexdigest()


def record_tower(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes the fingerprint of a LLaVA's tower into its config.

    Args:
        model: LLaVA.
        state: its weights under their names without adapters, where the model itself holds them in pieces (ZeRO-3) or
            beside adapters.
    """
    tower = {
        (_TOWER + name).replace(".base_layer.", "."): parameter
        for name, parameter in model.model.vision_tower.named_parameters()
        if ".lora_" not in name
    }
    setattr(model.config, FIELD, fingerprint((tower if state is None else state)[name] for name in tower))


def check_tower(model: PreTrainedModel) -> None:
    """Compares a LLaVA's tower with its config, if that has a fingerprint; under ZeRO-3 all ranks must come here.

    Raises:
        ValueError: it is another tower.
    """
    recorded = getattr(model.config, FIELD, None)
    if recorded is None:
        return
    parameters = list(model.model.vision_tower.parameters())
    if any(parameter.is_meta or not parameter.is_floating_point() for parameter in parameters):
        logger.warning("the vision tower is quantised or offloaded, and its fingerprint is not checked")
        return
    with _whole(parameters):
        found = fingerprint(parameters)
    if found != recorded:
        raise ValueError(
            f"the vision tower of {model.config.name_or_path} is not the one that projector and language model were "
            f"trained with: config.json records {FIELD} {recorded[:12]}..., but its weights have {found[:12]}.... "
            f"Restore the weights that were saved with it; for a tower changed on purpose, remove {FIELD} from "
            f"config.json"
        )


def _signs(tensor: Tensor) -> str:
    bits = np.packbits(torch.signbit(tensor.detach()).flatten().cpu().numpy()).tobytes()
    return f"{tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Brings parameters together that ZeRO-3 has split over the ranks."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)
