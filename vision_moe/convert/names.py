"""OpenAI's names of a CLIP's tensors and ours (transformers'), as data, and translation both ways.

Official CLIP-MoE and open_clip keep OpenAI's names; a CLIP-MoE has `gate` and `experts.{j}` in the place of `mlp`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Operation = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# Ours -> theirs, outside the blocks.
_WHOLE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
# They multiply from the right, so nn.Linear's weight is the transpose.
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"

_TOWERS = {
    "vision": ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    "text": ("text_model.encoder.layers", "transformer.resblocks"),
}
# Within a block; weights and biases alike.
_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_EXPERTS = {
    "mlp.experts.up_proj": "c_fc.weight",
    "mlp.experts.up_proj_bias": "c_fc.bias",
    "mlp.experts.down_proj": "c_proj.weight",
    "mlp.experts.down_proj_bias": "c_proj.bias",
}


class Rule(NamedTuple):
    """Tensors of theirs and those of ours that hold the same numbers, and how each side is made from the other."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Operation = tuple
    to_theirs: Operation = tuple


class Blocks(NamedTuple):
    """The blocks of a tower.

    Attributes:
        depth: number of blocks.
        num_experts: of each block that is a mixture, by its index.
    """

    depth: int
    num_experts: Mapping[int, int]


def read_blocks(names: Iterable[str], tower: str) -> Blocks:
    """The blocks of the tower "vision" or "text", read off their names."""
    prefix = re.escape(_TOWERS[tower][1])
    pattern = re.compile(rf"{prefix}\.(\d+)\.(?:experts\.(\d+)\.)?")
    depth, num_experts = 0, dict[int, int]()
    for match in filter(None, map(pattern.match, names)):
        layer = int(match[1])
        depth = max(depth, layer + 1)
        if match[2] is not None:
            num_experts[layer] = max(num_experts.get(layer, 0), int(match[2]) + 1)
    return Blocks(depth, num_experts)


def rules(vision: Blocks, text: Blocks, positions: Rule) -> list[Rule]:
    """All rules of a model; `positions` is the one for the text positions, in which the formats differ."""
    found = [Rule((theirs,), (ours,)) for ours, theirs in _WHOLE.items()]
    found += [Rule((theirs,), (ours,), _transpose, _transpose) for ours, theirs in _TRANSPOSED.items()]
    found.append(positions)
    for tower, blocks in (("vision", vision), ("text", text)):
        ours, theirs = _TOWERS[tower]
        for layer in range(blocks.depth):
            found += _block_rules(f"{ours}.{layer}", f"{theirs}.{layer}", blocks.num_experts.get(layer, 0))
    return found


def to_ours(state: State, found: Sequence[Rule], source: str) -> dict[str, Tensor]:
    """Our tensors from theirs; `source` names the checkpoint in errors.

    Raises:
        ValueError: tensors are missing, or some are not accounted for.
    """
    _check_names(state, [name for rule in found for name in rule.theirs], source)
    return {
        name: tensor
        for rule in found
        for name, tensor in zip(rule.ours, rule.to_ours([state[name] for name in rule.theirs]), strict=True)
    }


def to_theirs(state: State, found: Sequence[Rule]) -> dict[str, Tensor]:
    """Their tensors from ours.

    Raises:
        ValueError: our model has tensors that their format has no place for.
    """
    _check_names(state, [name for rule in found for name in rule.ours], "the model")
    return {
        name: tensor.detach().clone()
        for rule in found
        for name, tensor in zip(rule.theirs, rule.to_theirs([state[name] for name in rule.ours]), strict=True)
    }


def _block_rules(ours: str, theirs: str, num_experts: int) -> Iterator[Rule]:
    same = _BLOCK if num_experts else {**_BLOCK, **_MLP}
    for kind in ("weight", "bias"):
        for our_part, their_part in same.items():
            yield Rule((f"{theirs}.{their_part}.{kind}",), (f"{ours}.{our_part}.{kind}",))
        parts = tuple(f"{ours}.{part}.{kind}" for part in _ATTENTION)
        yield Rule((f"{theirs}.attn.in_proj_{kind}",), parts, _thirds, _join)
    if not num_experts:
        return
    yield Rule((f"{theirs}.gate.weight",), (f"{ours}.mlp.router.weight",))
    for our_part, their_part in _EXPERTS.items():
        experts = tuple(f"{theirs}.experts.{expert}.{their_part}" for expert in range(num_experts))
        yield Rule(experts, (f"{ours}.{our_part}",), _stack, _unbind)


def _transpose(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.T.contiguous() for tensor in tensors]


def _thirds(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    # Clones, because parts of one storage cannot be written to safetensors one by one.
    return [part.clone() for part in tensors[0].chunk(3)]


def _join(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat(list(tensors))]


def _stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.stack(list(tensors))]


def _unbind(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors[0].unbind()


def _check_names(state: State, wanted: Sequence[str], source: str) -> None:
    missing, unexpected = sorted(set(wanted) - state.keys()), sorted(state.keys() - set(wanted))
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise ValueError(f"the tensors of {source} are not those of this format; {'; '.join(parts)}")
