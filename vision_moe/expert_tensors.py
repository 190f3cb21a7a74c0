"""Tensors of a MoE block made from those of a dense MLP, so that the block computes what the MLP does.

D model dim, F hidden dim of the dense MLP, E experts, G parts that it is cut into for narrow experts.
"""

from torch import Tensor

from vision_moe.model.configuration import MoEFields

# Name of an expert tensor below a mixture -> its slice of a dense MLP, by the names of TowerFamily.dense_name.
EXPERT_NAMES = {
    "experts.up_proj": "fc1.weight",
    "experts.up_proj_bias": "fc1.bias",
    "experts.down_proj": "fc2.weight",
    "experts.down_proj_bias": "fc2.bias",
}
# The same for the shared expert.
SHARED_NAMES = {name.replace("experts.", "shared_expert."): dense for name, dense in EXPERT_NAMES.items()}
ROUTER_NAMES = ("router.weight", "router.choice_bias")


def num_parts(config: MoEFields) -> int:
    """G, the number of narrow experts that make up one dense MLP.

    Raises:
        ValueError: if a mixture of this config cannot compute what its dense parent does.
    """
    if not config.norm_topk_prob:
        raise ValueError("upcycling needs gates that sum to 1, or the MLPs' outputs shrink; set norm_topk_prob=True")
    parts = round(1 / config.expert_width_factor)
    if abs(config.expert_width_factor * parts - 1) > 1e-6:
        raise ValueError(
            f"upcycling cuts the dense MLP into whole parts: expert_width_factor must be 1 / a whole number, but got "
            f"{config.expert_width_factor}"
        )
    if parts > 1 and config.shared_expert:
        raise ValueError("upcycling keeps its parent's function with a shared expert or narrow experts, not with both")
    chosen = 0 if config.router_type == "expert_choice" else config.num_experts_per_tok
    if config.num_experts % parts or chosen % parts:
        raise ValueError(
            f"with expert_width_factor=1/{parts}, num_experts and num_experts_per_tok must be multiples of {parts}, a "
            f"whole MLP, but got {config.num_experts} and {config.num_experts_per_tok}"
        )
    return parts


def expert_part(leaf: str, dense: Tensor, part: int, parts: int, scale: float) -> Tensor:
    """An expert's tensor: one of G parts of a dense MLP's along its hidden dim, with the output scaled.

    The gates of a copy's parts are equal, so that each is 1 / G of the copy's gate. That is made good in the output
    weights, and not in the output bias, which all parts share.

    Args:
        leaf: name of the tensor, a key of `EXPERT_NAMES` or `SHARED_NAMES`.
        dense: the dense MLP's tensor.
        part: number of the part, in [0, G).
        parts: G.
        scale: of the output.

    Returns:
        a tensor that may share its memory with `dense`.
    """
    if "up_proj" in leaf:
        return dense.chunk(parts, dim=0)[part]
    if leaf.endswith("bias"):
        return _scaled(dense, scale)
    return _scaled(dense.chunk(parts, dim=1)[part], scale * parts)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    # A product with 1 would be a copy, of all the experts' weights.
    return tensor if scale == 1 else tensor * scale
