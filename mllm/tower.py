"""The vision tower of a LLaVA, taken from a CLIP or CLIP-MoE and cut at the layer where it is read."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPModel, CLIPVisionModel, PreTrainedModel

from vision_moe.model import CLIPMoEModel, CLIPMoEVisionModel


def load_tower(vision: str | Path | PreTrainedModel, select_layer: int, dtype: torch.dtype) -> PreTrainedModel:
    """A tower whose last hidden state is hidden state `select_layer` of the given one.

    The blocks behind that layer would run for nothing, and their experts and routers would never get a gradient.

    Args:
        vision: folder or hub name, or a model, which is left as it is.
        select_layer: index into the hidden states, of which 0 is the embeddings'; -2 is LLaVA's.
        dtype: of the weights.

    Raises:
        ValueError: the model is neither a CLIP nor a CLIP-MoE, weights are missing, or there is no such layer.
    """
    source = _image_half(vision) if isinstance(vision, PreTrainedModel) else _from_folder(vision, dtype)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = _num_layers(config.num_hidden_layers, select_layer)
    if getattr(config, "moe_layers", None) is not None:
        config.moe_layers = [layer for layer in config.moe_layers if layer < config.num_hidden_layers]
    tower = type(source)._from_config(config, dtype=dtype)
    weights = source.state_dict()
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    return tower


def _image_half(model: PreTrainedModel) -> PreTrainedModel:
    if isinstance(model, CLIPModel | CLIPMoEModel):
        return model.vision_model
    if isinstance(model, CLIPVisionModel | CLIPMoEVisionModel):
        return model
    raise ValueError(
        f"the vision tower must be a CLIPModel, CLIPVisionModel, CLIPMoEModel or CLIPMoEVisionModel, but got "
        f"{type(model).__name__}"
    )


def _from_folder(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    model_type = AutoConfig.from_pretrained(folder).model_type
    classes = {
        "clip": CLIPVisionModel,
        "clip_vision_model": CLIPVisionModel,
        "clip_moe": CLIPMoEVisionModel,
        "clip_moe_vision_model": CLIPMoEVisionModel,
    }
    if model_type not in classes:
        raise ValueError(f"{folder} is a {model_type!r}; a vision tower must be one of: {', '.join(classes)}")
    tower, report = classes[model_type].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"{folder} does not hold the whole vision tower: missing {sorted(report['missing_keys'])}, of another "
            f"shape {sorted(report['mismatched_keys'])}"
        )
    return tower


def _num_layers(depth: int, select_layer: int) -> int:
    """Blocks that hidden state `select_layer` needs."""
    needed = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= needed <= depth:
        raise ValueError(
            f"select_layer must be in [1, {depth}] or [-{depth}, -1] for a tower of {depth} layers, but got "
            f"{select_layer}"
        )
    return needed
