"""Dense dual encoder -> mixture, and back to one expert; CLIP and the other families of vision_moe.model.families.

`upcycle` copies one dense model's MLPs into all experts (sparse upcycling, Komatsuzaki et al. 2023; CLIP-UP);
`merge_donors` takes one expert per fine-tuned model (Diversified Multiplet Upcycling, Zhang et al. 2024, section 4).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from vision_moe.expert_tensors import EXPERT_NAMES, ROUTER_NAMES, SHARED_NAMES, expert_part, num_parts
from vision_moe.mixture_config import Layers, dense_config, moe_config
from vision_moe.model.families import ENCODER_FAMILIES, TOWERS, block_tensor, tower_family

logger = logging.getLogger(__name__)


def upcycle(
    dense: PreTrainedModel,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    layers: Layers = "all",
    towers: Iterable[str] = TOWERS,
    router_std: float = 0.02,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Makes a mixture whose experts are all copies of the dense MLP; it computes what its parent does.

    That holds in evaluation and for every token that none of its experts drops (capacity) or leaves (expert choice).

    With a shared expert, it and the routed experts are copies that give half of the output each.

    With narrow experts (expert_width_factor = 1 / G) the dense MLP is cut into G parts along its hidden dim, and
    experts nG to nG + G - 1 are these parts. They start with one row of the router, so that a token takes all parts of
    a copy (virtual groups, He et al. 2024, "Upcycling Large Language Models into Mixture of Experts").

    Args:
        dense: the parent, left as it is.
        num_experts: experts per MoE block.
        num_experts_per_tok: experts that compute each token.
        layers: which blocks of each tower become mixtures: "all"; "odd" = 1, 3, 5, ...; "every_n" = n - 1, 2n - 1, ...
            (V-MoE); an int n = the last n, or all of a shorter tower; or a list of indices counted from 0, valid in
            each tower. Or one of these for "vision" and one for "text", as a mapping.
        towers: which of "vision" and "text" get mixtures.
        router_std: standard deviation of the routers' initial weights.
        seed: of the routers' initial weights.
        **fields: further fields of both towers' configs, see `vision_moe.model.configuration.MoEFields`.

    Returns:
        a new model with the parent's dtype, device and training mode; it shares no memory with the parent.

    Raises:
        ValueError: if the parent is no dense model of a known family, the layers, the towers or the numbers of experts
            are invalid, or the fields do not let the new model compute what its parent does.
    """
    return _build([dense] * num_experts, num_experts_per_tok, layers, towers, router_std, seed, fields)


def merge_donors(
    base: PreTrainedModel,
    donors: Sequence[PreTrainedModel],
    num_experts_per_tok: int = 2,
    layers: Layers = "all",
    towers: Iterable[str] = TOWERS,
    router_std: float = 0.02,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Makes a mixture with expert 0 from `base`, expert j from `donors[j - 1]`, and all other weights from `base`.

    Args:
        base: the model that the donors were fine-tuned from.
        donors: dense models of the base's family and shape, of which only the MLPs are used.
        num_experts_per_tok: as in `upcycle`.
        layers: as in `upcycle`.
        towers: as in `upcycle`.
        router_std: as in `upcycle`.
        seed: as in `upcycle`.
        **fields: as in `upcycle`, with whole MLPs as experts.

    Raises:
        ValueError: if a donor's shape is not the base's, the experts are narrow, or as in `upcycle`.
    """
    if not donors:
        raise ValueError("merge_donors needs at least one donor; use upcycle() for copies of one model")
    if fields.get("expert_width_factor", 1) != 1:
        raise ValueError(
            f"a donor's MLP is one whole expert, but got expert_width_factor={fields['expert_width_factor']}"
        )
    moe = _build([base, *donors], num_experts_per_tok, layers, towers, router_std, seed, fields)
    for number, donor in enumerate(donors, start=1):
        _warn_of_unused_weights(base, donor, number, moe)
    return moe


def expert_as_dense(moe: PreTrainedModel, expert: int) -> PreTrainedModel:
    """The dense model whose MLP, in every MoE block, is one expert; all other weights are the mixture's.

    Args:
        moe: a dual encoder with mixtures.
        expert: index j of the expert, valid in each tower that has MoE blocks.

    Raises:
        ValueError: if there is no such expert, or the dense family cannot express the model (a shared expert, narrow
            experts, a CLIP without `pre_layernorm`).
    """
    for tower in TOWERS:
        _check_expert(getattr(moe.config, f"{tower}_config"), expert)
    state: dict[str, Tensor] = {}
    for name, tensor in moe.state_dict().items():
        part = block_tensor(moe.config, name)
        if part is not None and part.leaf in EXPERT_NAMES:
            dense_name = part.family.dense_name(EXPERT_NAMES[part.leaf])
            state[f"{part.block}.{dense_name}"] = tensor[expert].clone()
        elif part is None or part.leaf not in ROUTER_NAMES:
            state[name] = tensor.clone()
    return _load(dense_config(moe.config), state, like=moe)


def _check_expert(tower: Any, expert: int) -> None:
    for name, value in tower_family(tower).moe_only.items():
        if getattr(tower, name) != value:
            raise ValueError(
                f"transformers' {tower_family(tower).dense} always has {name}={value}, but this tower has "
                f"{name}={getattr(tower, name)}"
            )
    if not tower.moe_block_indices:
        return
    if not 0 <= expert < tower.num_experts:
        raise ValueError(f"expert must be in [0, {tower.num_experts}), but got {expert}")
    if tower.shared_expert or tower.expert_width_factor != 1:
        raise ValueError(
            f"an expert is a whole MLP only without a shared expert and with expert_width_factor=1, but got "
            f"shared_expert={tower.shared_expert}, expert_width_factor={tower.expert_width_factor}"
        )


def _build(
    sources: Sequence[PreTrainedModel],
    num_experts_per_tok: int,
    layers: Layers,
    towers: Iterable[str],
    router_std: float,
    seed: int,
    fields: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A mixture whose expert j is the MLP of source j, and whose other weights are source 0's."""
    if not sources:
        raise ValueError("num_experts must be at least 1, but got 0")
    if not 1 <= num_experts_per_tok <= len(sources):
        raise ValueError(f"num_experts_per_tok must be in [1, {len(sources)}], but got {num_experts_per_tok}")
    for source in sources:
        _check_source(source, sources[0])
    base = sources[0]
    config = moe_config(base.config, len(sources), num_experts_per_tok, layers, towers, fields or {})
    parts = num_parts(config.vision_config)
    scale = 0.5 if config.vision_config.shared_expert else 1.0
    states = [source.state_dict() for source in sources]
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: torch.Size) -> Tensor:
        part = block_tensor(config, name)
        leaf = "" if part is None else part.leaf
        if part is not None and leaf in EXPERT_NAMES:
            dense_name = f"{part.block}.{part.family.dense_name(EXPERT_NAMES[leaf])}"
            dense = [state[dense_name] for state in states]
            return torch.stack([expert_part(leaf, source, i % parts, parts, scale) for i, source in enumerate(dense)])
        if part is not None and leaf in SHARED_NAMES:
            dense_name = f"{part.block}.{part.family.dense_name(SHARED_NAMES[leaf])}"
            return expert_part(leaf, states[0][dense_name], 0, 1, scale).clone()
        if leaf == "router.weight":
            rows = torch.randn(shape[0] // parts, shape[1], generator=generator) * router_std
            return rows.repeat_interleave(parts, dim=0).to(base.dtype)
        if leaf == "router.choice_bias":
            return torch.zeros(shape)
        return states[0][name].clone()

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MODEL_MAPPING[type(config)](config).state_dict().items()}
    return _load(config, {name: tensor(name, shape) for name, shape in shapes.items()}, like=base)


def _load(config: PreTrainedConfig, state: dict[str, Tensor], *, like: PreTrainedModel) -> PreTrainedModel:
    """A model that holds exactly these tensors, with the dtype, device and training mode of another."""
    model, info = MODEL_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=like.dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    model.name_or_path = model.config.name_or_path = ""  # transformers writes the None above as a path
    return model.to(like.device).train(like.training)


def _check_source(source: PreTrainedModel, base: PreTrainedModel) -> None:
    known = [name for family in ENCODER_FAMILIES for name in (family.dense, family.moe)]
    config = getattr(source, "config", None)
    if (
        getattr(config, "model_type", None) not in known
        or not isinstance(source, MODEL_MAPPING[type(config)])
        or _has_experts(source)
    ):
        raise ValueError(
            f"upcycling starts from a dual encoder without experts of a known family ({', '.join(known)}), but got "
            f"{type(source).__name__}"
        )
    mine, theirs = ({k: v.shape for k, v in model.state_dict().items()} for model in (source, base))
    different = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if different:
        raise ValueError(f"a donor's weights differ in shape from the base's, first at {different[0]}")


def _has_experts(model: PreTrainedModel) -> bool:
    return any(getattr(getattr(model.config, f"{tower}_config"), "moe_block_indices", ()) for tower in TOWERS)


def _warn_of_unused_weights(base: PreTrainedModel, donor: PreTrainedModel, number: int, moe: PreTrainedModel) -> None:
    """Logs where a donor was trained in weights that the mixture takes from the base."""
    kept = moe.state_dict().keys()
    ours, theirs = base.state_dict(), donor.state_dict()
    changed = [k for k in ours if k in kept and not torch.equal(ours[k], theirs[k].to(ours[k]))]
    if changed:
        logger.warning(
            "donor %d differs from the base in %d tensors that a mixture takes from the base, among them %s",
            number,
            len(changed),
            changed[0],
        )
