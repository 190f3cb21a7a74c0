"""The vision tower of a LLaVA, of any family of vision_moe.model.families, cut at the layer where it is read."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from vision_moe.assets import find_model
from vision_moe.convert.__main__ import OPEN_CLIP_CONFIG, convert
from vision_moe.model import CLIPMoEVisionModel
from vision_moe.model.families import ENCODER_BY_TYPE, TOWER_BY_TYPE, tower_family


def resolve_tower(name: str, converted: Path) -> str:
    """Folder or hub name that `load_tower` takes for a recipe's `vision`.

    Args:
        name: "scenes-clip", a folder, a hub name, or a folder as open_clip writes it.
        converted: where the model of an open_clip folder is written, unless it is there.
    """
    folder = Path(find_model(name))
    if not (folder / OPEN_CLIP_CONFIG).is_file() or (folder / "config.json").is_file():
        return str(folder) if folder.is_dir() else name
    if not converted.is_dir():
        convert(name, converted)
    return str(converted)


def load_tower(vision: str | Path | PreTrainedModel, select_layer: int, dtype: torch.dtype) -> PreTrainedModel:
    """A tower whose last hidden state is hidden state `select_layer` of the given one.

    The blocks behind that layer would run for nothing, and their experts and routers would never get a gradient.

    Args:
        vision: folder or hub name, or a model, which is left as it is.
        select_layer: index into the hidden states, of which 0 is the embeddings'; -2 is LLaVA's.
        dtype: of the weights.

    Raises:
        ValueError: the model has no image tower that LLaVA can use, weights are missing, or there is no such layer.
    """
    source = _image_half(vision) if isinstance(vision, PreTrainedModel) else _from_folder(vision, dtype)
    _check_usable(source.config)
    depth = _num_layers(source.config.num_hidden_layers, select_layer)
    tower = type(source)._from_config(_cut_config(source.config, depth), dtype=dtype)
    weights = source.state_dict()
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    return tower


def _cut_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The config of a tower's first blocks."""
    skipped = {"model_type", "num_hidden_layers", *tower_family(config).depth_fields}
    fields: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name not in skipped}
    if fields.get("moe_layers") is not None:
        fields["moe_layers"] = [layer for layer in fields["moe_layers"] if layer < depth]
    return type(config)(
        **fields,
        num_hidden_layers=depth,
        attn_implementation=config._attn_implementation,
        experts_implementation=config._experts_implementation,
    )


def _check_usable(config: PreTrainedConfig) -> None:
    family = TOWER_BY_TYPE.get(config.model_type)
    if family is None or family.modality != "vision":
        known = ", ".join(name for name, row in TOWER_BY_TYPE.items() if row.modality == "vision")
        raise ValueError(f"the vision tower must be one of {known}, but got a {config.model_type!r}")
    if not family.fixed_resolution:
        raise ValueError(
            f"a {config.model_type!r} (NaFlex) takes patches of pictures of any shape, which LLaVA-1.5 cannot give it; "
            "use a SigLIP 2 of fixed resolution"
        )


def _image_half(model: PreTrainedModel) -> PreTrainedModel:
    return model.vision_model if model.config.model_type in ENCODER_BY_TYPE else model


def _from_folder(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type not in ENCODER_BY_TYPE and model_type not in TOWER_BY_TYPE:
        known = ", ".join((*ENCODER_BY_TYPE, *TOWER_BY_TYPE))
        raise ValueError(f"{folder} is a {model_type!r}; a vision tower must be (of) one of: {known}")
    # A CLIP's tower loads without the text tower.
    loader = {"clip": CLIPVisionModel, "clip_moe": CLIPMoEVisionModel}.get(model_type, AutoModel)
    # transformers would list the weights of the text tower, which are left out on purpose, as a warning.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"{folder} does not hold the whole vision tower: missing {sorted(report['missing_keys'])}, of another "
            f"shape {sorted(report['mismatched_keys'])}"
        )
    return _image_half(model)


def _num_layers(depth: int, select_layer: int) -> int:
    """Blocks that hidden state `select_layer` needs."""
    needed = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= needed <= depth:
        raise ValueError(
            f"select_layer must be in [1, {depth}] or [-{depth}, -1] for a tower of {depth} layers, but got "
            f"{select_layer}"
        )
    return needed
