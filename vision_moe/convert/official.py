"""Checkpoints of the official CLIP-MoE code (OpenSparseLLMs/CLIP-MoE) to ours and back.

A checkpoint tells everything but `num_experts_per_tok`. Its text positions lie in two tables, of which the first 20
rows of one and the others of the other are used (Long-CLIP); ours is one table of the rows in use.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from vision_moe.convert.names import TEXT_POSITIONS, Blocks, Rule, State, read_blocks, rules, to_ours, to_theirs
from vision_moe.convert.sizes import build, read_sizes
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel, CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.positions import NUM_KEPT

logger = logging.getLogger(__name__)

_HEAD_DIM = 64
# What the official code computes in evaluation, whatever its checkpoint holds.
_FIXED = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "shared_expert": False,
    "expert_width_factor": 1.0,
    "router_type": "token_choice",
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "eval_capacity_factor": None,
    "router_bias_update_rate": None,
}


def is_official(state: State) -> bool:
    """Whether the tensors carry the names of an official CLIP-MoE."""
    return any(read_blocks(state, tower).num_experts for tower in ("vision", "text"))


def from_official(state: State, num_experts_per_tok: int) -> CLIPMoEModel:
    """A CLIP-MoE from the official code's state dict.

    Args:
        state: its tensors.
        num_experts_per_tok: experts of each token, which the checkpoint does not tell; 2 in the released ones.

    Raises:
        ValueError: tensors are missing or unexpected, or the sizes are not those of OpenAI's family.
    """
    vision, text = (read_blocks(state, tower) for tower in ("vision", "text"))
    ours = to_ours(state, rules(vision, text, _POSITIONS), "the official CLIP-MoE checkpoint")
    sizes = read_sizes(state, vision, text)
    for tower, blocks in (("vision_config", vision), ("text_config", text)):
        sizes[tower] |= {
            "num_attention_heads": _num_heads(sizes[tower]["hidden_size"]),
            "hidden_act": "quick_gelu",
            "num_experts_per_tok": num_experts_per_tok,
            **_mixtures(blocks),
        }
    config = CLIPMoEConfig(
        projection_dim=sizes["projection_dim"],
        vision_config=CLIPMoEVisionConfig(**sizes["vision_config"]),
        text_config=CLIPMoETextConfig(**sizes["text_config"]),
    )
    return build(CLIPMoEModel, config, ours)


def to_official(model: CLIPMoEModel) -> dict[str, Tensor]:
    """The official code's state dict of a CLIP-MoE; both of its position tables hold all rows of ours.

    Raises:
        ValueError: the official code cannot express the model.
    """
    _check_expressible(model.config)
    vision, text = (
        Blocks(tower.num_hidden_layers, dict.fromkeys(tower.moe_block_indices, tower.num_experts))
        for tower in (model.config.vision_config, model.config.text_config)
    )
    logger.info(
        "the checkpoint does not hold num_experts_per_tok; pass top_k=%d to the official code",
        model.config.vision_config.num_experts_per_tok,
    )
    return to_theirs(model.state_dict(), rules(vision, text, _POSITIONS))


def _positions_in_use(tables: Sequence[Tensor]) -> Sequence[Tensor]:
    first_PD, rest_PD = tables
    return [torch.cat([first_PD[:NUM_KEPT], rest_PD[NUM_KEPT:]])]


_POSITIONS = Rule(
    ("positional_embedding", "positional_embedding_res"),
    (TEXT_POSITIONS,),
    _positions_in_use,
    lambda tables: [tables[0], tables[0]],
)


def _num_heads(width: int) -> int:
    if width % _HEAD_DIM:
        raise ValueError(f"OpenAI's CLIPs have heads of {_HEAD_DIM}, but got a tower of width {width}")
    return width // _HEAD_DIM


def _mixtures(blocks: Blocks) -> dict[str, Any]:
    numbers = set(blocks.num_experts.values())
    if len(numbers) > 1:
        raise ValueError(f"the blocks of a tower must have equally many experts, but got {sorted(numbers)}")
    fields: dict[str, Any] = {"moe_layers": sorted(blocks.num_experts)}
    return {**fields, "num_experts": numbers.pop()} if numbers else fields


def _check_expressible(config: CLIPConfig) -> None:
    towers = {"vision": config.vision_config, "text": config.text_config}
    for name, tower in towers.items():
        wanted: dict[str, Any] = {**_FIXED, "num_attention_heads": _num_heads(tower.hidden_size)}
        if name == "vision":
            wanted["pre_layernorm"] = True
        other = {field: getattr(tower, field) for field, value in wanted.items() if getattr(tower, field) != value}
        if other:
            raise ValueError(f"the official code has no {', '.join(f'{k}={v!r}' for k, v in other.items())} ({name})")
    if len({tower.num_experts_per_tok for tower in towers.values() if tower.moe_block_indices}) > 1:
        raise ValueError("the official code has one num_experts_per_tok for both towers; theirs differ")
    last = len(towers["vision"].moe_block_indices)
    for name, tower in towers.items():
        depth = tower.num_hidden_layers
        if list(tower.moe_block_indices) != list(range(max(0, depth - last), depth)):
            raise ValueError(
                f"the official code makes the last n blocks of both towers mixtures, but the {name} tower has them in "
                f"{list(tower.moe_block_indices)} of {depth}"
            )
