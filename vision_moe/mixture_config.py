"""Config of a dense dual encoder -> config of its mixture, and back; CLIP and the other families."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from vision_moe.model.configuration import MoEFields
from vision_moe.model.families import TOWERS, encoder_family, tower_family

TowerLayers = str | int | Sequence[int]
Layers = TowerLayers | Mapping[str, TowerLayers]


def moe_config(
    dense: PreTrainedConfig,
    num_experts: int,
    num_experts_per_tok: int,
    layers: Layers,
    towers: Iterable[str],
    moe_fields: Mapping[str, Any],
) -> PreTrainedConfig:
    """The config of a dual encoder's mixture; arguments as of `vision_moe.upcycle.upcycle`.

    Raises:
        ValueError: a field is unknown, or the towers or their layers are invalid.
    """
    towers = tuple(towers)
    allowed = MoEFields.__dataclass_fields__.keys() - {"num_experts", "num_experts_per_tok", "moe_layers"}
    if unknown := sorted(moe_fields.keys() - allowed):
        raise ValueError(f"unknown fields {', '.join(unknown)}; choose among {', '.join(sorted(allowed))}")
    if not towers or not set(towers) <= set(TOWERS):
        raise ValueError(f"towers must be one or both of {', '.join(TOWERS)}, but got {towers}")
    chosen = layers if isinstance(layers, Mapping) else dict.fromkeys(towers, layers)
    if missing := sorted(set(towers) - chosen.keys()):
        raise ValueError(f"layers must name the blocks of each of towers={towers}, but lacks {', '.join(missing)}")

    def fields(tower: str) -> dict[str, Any]:
        config = getattr(dense, f"{tower}_config")
        return {
            **_tower_fields(config),
            **moe_fields,
            "model_type": tower_family(config).moe,
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_layers": resolve_layers(chosen[tower], config.num_hidden_layers) if tower in towers else [],
        }

    both = {f"{tower}_config": fields(tower) for tower in TOWERS}
    return CONFIG_MAPPING[encoder_family(dense).moe](**_shared_fields(dense), **both)


def _tower_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A tower's fields, without those that name its class or follow from others."""
    skipped = {"model_type", "architectures", *tower_family(config).depth_fields}
    return {k: v for k, v in config.to_dict().items() if k not in skipped}


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A dual encoder's fields, without its towers' and those that name its class."""
    skipped = ("model_type", "architectures", *(f"{tower}_config" for tower in TOWERS))
    return {k: v for k, v in config.to_dict().items() if k not in skipped}


def resolve_layers(layers: TowerLayers, depth: int) -> list[int]:
    """Indices of the MoE blocks in a tower of `depth` blocks; see `upcycle`.

    Raises:
        ValueError: if the choice is unknown or not in the tower.
    """
    if isinstance(layers, str):
        match = re.fullmatch(r"all|odd|every_([1-9]\d*)", layers)
        if match is None:
            raise ValueError(f"layers must be 'all', 'odd', 'every_n', an int or a list of ints, but got {layers!r}")
        step = {"all": 1, "odd": 2}.get(layers) or int(match[1])
        return list(range(step - 1, depth, step))
    if isinstance(layers, int):
        if layers < 1:
            raise ValueError(f"layers, the number of last blocks, must be at least 1, but got {layers}")
        return list(range(max(0, depth - layers), depth))
    if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"layers must be distinct and in [0, {depth}) for a tower of {depth} blocks, but got {layers}")
    return sorted(layers)


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the family's dense model: without the mixture's fields."""

    def fields(tower: str) -> dict[str, Any]:
        own = getattr(config, f"{tower}_config")
        family = tower_family(own)
        dropped = {*MoEFields.__dataclass_fields__, *family.moe_only}
        return {**{k: v for k, v in _tower_fields(own).items() if k not in dropped}, "model_type": family.dense}

    towers = {f"{tower}_config": fields(tower) for tower in TOWERS}
    return CONFIG_MAPPING[encoder_family(config).dense](**_shared_fields(config), **towers)
