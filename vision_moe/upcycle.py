"""Dense CLIP -> CLIP-MoE, and back to one expert.

`upcycle` copies one dense model's MLPs into all experts (sparse upcycling, Komatsuzaki et al. 2023; CLIP-UP);
`merge_donors` takes one expert per fine-tuned model (Diversified Multiplet Upcycling, Zhang et al. 2024, section 4).
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vision_moe.model import CLIPMoEConfig, CLIPMoEModel, CLIPMoETextConfig, CLIPMoEVisionConfig
from vision_moe.model.configuration import MoEFields

logger = logging.getLogger(__name__)

TOWERS = ("vision", "text")
# Name of an expert tensor in a MoE block -> name of its slice in a dense block; both below `...layers.N.mlp.`.
EXPERT_NAMES = {
    "experts.up_proj": "fc1.weight",
    "experts.up_proj_bias": "fc1.bias",
    "experts.down_proj": "fc2.weight",
    "experts.down_proj_bias": "fc2.bias",
}
Layers = str | int | Sequence[int]
Model = TypeVar("Model", CLIPModel, CLIPMoEModel)


def upcycle(
    dense: CLIPModel,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    layers: Layers = "all",
    towers: Iterable[str] = TOWERS,
    router_std: float = 0.02,
    seed: int = 0,
) -> CLIPMoEModel:
    """Makes a CLIP-MoE whose experts are all copies of the dense MLP; it computes what its parent does.

    Args:
        dense: the parent, left as it is.
        num_experts: experts per MoE block.
        num_experts_per_tok: experts that compute each token.
        layers: which blocks of each tower become mixtures: "all"; "odd" = 1, 3, 5, ...; an int n = the last n, or all
            of a shorter tower; or a list of indices counted from 0, valid in each tower.
        towers: which of "vision" and "text" get mixtures.
        router_std: standard deviation of the routers' initial weights.
        seed: of the routers' initial weights.

    Returns:
        a new model with the parent's dtype, device and training mode; it shares no memory with the parent.

    Raises:
        ValueError: if the parent is no dense CLIP, or the layers, the towers or the numbers of experts are invalid.
    """
    return _build([dense] * num_experts, num_experts_per_tok, layers, towers, router_std, seed)


def merge_donors(
    base: CLIPModel,
    donors: Sequence[CLIPModel],
    num_experts_per_tok: int = 2,
    layers: Layers = "all",
    towers: Iterable[str] = TOWERS,
    router_std: float = 0.02,
    seed: int = 0,
) -> CLIPMoEModel:
    """Makes a CLIP-MoE with expert 0 from `base`, expert j from `donors[j - 1]`, and all other weights from `base`.

    Args:
        base: the model that the donors were fine-tuned from.
        donors: dense CLIPs of the base's shape, of which only the MLPs are used.
        num_experts_per_tok: as in `upcycle`.
        layers: as in `upcycle`.
        towers: as in `upcycle`.
        router_std: as in `upcycle`.
        seed: as in `upcycle`.

    Raises:
        ValueError: if a donor's shape is not the base's, or as in `upcycle`.
    """
    if not donors:
        raise ValueError("merge_donors needs at least one donor; use upcycle() for copies of one model")
    moe = _build([base, *donors], num_experts_per_tok, layers, towers, router_std, seed)
    for number, donor in enumerate(donors, start=1):
        _warn_of_unused_weights(base, donor, number, moe)
    return moe


def expert_as_dense(moe: CLIPMoEModel, expert: int) -> CLIPModel:
    """The dense CLIP whose MLP, in every MoE block, is one expert; all other weights are the mixture's.

    Args:
        moe: a CLIP-MoE.
        expert: index j of the expert, valid in each tower that has MoE blocks.

    Raises:
        ValueError: if there is no such expert, or CLIP cannot express the model (no `pre_layernorm`).
    """
    if not moe.config.vision_config.pre_layernorm:
        raise ValueError("transformers' CLIP always has a pre-layernorm, but this image tower has pre_layernorm=False")
    for tower in (moe.config.vision_config, moe.config.text_config):
        if tower.moe_block_indices and not 0 <= expert < tower.num_experts:
            raise ValueError(f"expert must be in [0, {tower.num_experts}), but got {expert}")
    state: dict[str, Tensor] = {}
    for name, tensor in moe.state_dict().items():
        prefix, mlp, leaf = name.rpartition(".mlp.")
        if leaf in EXPERT_NAMES:
            state[prefix + mlp + EXPERT_NAMES[leaf]] = tensor[expert].clone()
        elif leaf != "router.weight":
            state[name] = tensor.clone()
    own = _moe_field_names()
    towers = {
        f"{tower}_config": {k: v for k, v in getattr(moe.config, f"{tower}_config").to_dict().items() if k not in own}
        for tower in TOWERS
    }
    fields = {k: v for k, v in moe.config.to_dict().items() if k not in (*towers, "model_type", "architectures")}
    return _load(CLIPModel, CLIPConfig(**fields, **towers), state, like=moe)


def _build(
    sources: Sequence[CLIPModel],
    num_experts_per_tok: int,
    layers: Layers,
    towers: Iterable[str],
    router_std: float,
    seed: int,
) -> CLIPMoEModel:
    """A mixture whose expert j is the MLP of source j, and whose other weights are source 0's."""
    if not sources:
        raise ValueError("num_experts must be at least 1, but got 0")
    if not 1 <= num_experts_per_tok <= len(sources):
        raise ValueError(f"num_experts_per_tok must be in [1, {len(sources)}], but got {num_experts_per_tok}")
    for source in sources:
        _check_source(source, sources[0])
    base = sources[0]
    config = _moe_config(base, len(sources), num_experts_per_tok, layers, towers)
    states = [source.state_dict() for source in sources]
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: torch.Size) -> Tensor:
        prefix, mlp, leaf = name.rpartition(".mlp.")
        if leaf in EXPERT_NAMES:
            return torch.stack([state[prefix + mlp + EXPERT_NAMES[leaf]] for state in states])
        if leaf == "router.weight":
            return (torch.randn(shape, generator=generator) * router_std).to(base.dtype)
        return states[0][name].clone()

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CLIPMoEModel(config).state_dict().items()}
    return _load(CLIPMoEModel, config, {name: tensor(name, shape) for name, shape in shapes.items()}, like=base)


def _load(model_class: type[Model], config: CLIPConfig, state: dict[str, Tensor], *, like: CLIPModel) -> Model:
    """A model that holds exactly these tensors, with the dtype, device and training mode of another."""
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=like.dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    model.name_or_path = model.config.name_or_path = ""  # transformers writes the None above as a path
    return model.to(like.device).train(like.training)


def _moe_config(
    base: CLIPModel, num_experts: int, num_experts_per_tok: int, layers: Layers, towers: Iterable[str]
) -> CLIPMoEConfig:
    towers = tuple(towers)
    if not towers or not set(towers) <= set(TOWERS):
        raise ValueError(f"towers must be one or both of {', '.join(TOWERS)}, but got {towers}")

    def fields(tower: str) -> dict[str, Any]:
        config = getattr(base.config, f"{tower}_config")
        moe_layers = _resolve_layers(layers, config.num_hidden_layers) if tower in towers else []
        dense = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        return {
            **dense,
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_layers": moe_layers,
        }

    skipped = ("model_type", "architectures", "vision_config", "text_config")
    return CLIPMoEConfig(
        **{k: v for k, v in base.config.to_dict().items() if k not in skipped},
        vision_config=CLIPMoEVisionConfig(**fields("vision")),
        text_config=CLIPMoETextConfig(**fields("text")),
    )


def _resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Indices of the MoE blocks in a tower of `depth` blocks."""
    if isinstance(layers, str):
        choices = {"all": range(depth), "odd": range(1, depth, 2)}
        if layers not in choices:
            raise ValueError(f"layers must be 'all', 'odd', an int or a list of ints, but got {layers!r}")
        return list(choices[layers])
    if isinstance(layers, int):
        if layers < 1:
            raise ValueError(f"layers, the number of last blocks, must be at least 1, but got {layers}")
        return list(range(max(0, depth - layers), depth))
    if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"layers must be distinct and in [0, {depth}) for a tower of {depth} blocks, but got {layers}")
    return sorted(layers)


def _check_source(source: CLIPModel, base: CLIPModel) -> None:
    if not isinstance(source, CLIPModel) or _has_experts(source):
        raise ValueError(
            f"upcycling starts from a dense CLIPModel or CLIPMoEModel without experts, but got {type(source).__name__}"
        )
    mine, theirs = ({k: v.shape for k, v in model.state_dict().items()} for model in (source, base))
    different = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if different:
        raise ValueError(f"a donor's weights differ in shape from the base's, first at {different[0]}")


def _has_experts(model: CLIPModel) -> bool:
    towers = (model.config.vision_config, model.config.text_config)
    return isinstance(model, CLIPMoEModel) and any(tower.moe_block_indices for tower in towers)


def _warn_of_unused_weights(base: CLIPModel, donor: CLIPModel, number: int, moe: CLIPMoEModel) -> None:
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


def _moe_field_names() -> set[str]:
    return {*MoEFields.__dataclass_fields__, "pre_layernorm", "model_type", "architectures"}
