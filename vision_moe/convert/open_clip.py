"""Dense CLIPs of OpenAI and open_clip to transformers' CLIPModel and back.

The tensors tell neither the number of heads nor the activation: these come from open_clip's configuration of the
model, or from the model itself.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from vision_moe.convert.names import TEXT_POSITIONS, Blocks, Rule, State, read_blocks, rules, to_ours, to_theirs
from vision_moe.convert.sizes import build, read_sizes

if TYPE_CHECKING:
    from open_clip import CLIP

_POSITIONS = Rule(("positional_embedding",), (TEXT_POSITIONS,))
# OpenAI's TorchScript archives list these beside the tensors.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
# The fields of open_clip's configurations that transformers' CLIP can follow; whatever else is set is refused.
_TOWER_FIELDS = {
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"},
    "text_cfg": {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"},
}
_MODEL_FIELDS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}


class Architecture(NamedTuple):
    """What the tensors do not tell, and the widths, to notice a configuration of another model."""

    vision_width: int
    text_width: int
    vision_heads: int
    text_heads: int
    hidden_act: str
    layer_norm_eps: float = 1e-5


def architecture(model_cfg: Mapping[str, Any]) -> Architecture:
    """What an open_clip model configuration (`open_clip.get_model_config`, "model_cfg" of a hub folder) says.

    Raises:
        ValueError: the model has parts that transformers' CLIP lacks.
    """
    beyond = sorted(model_cfg.keys() - _MODEL_FIELDS)
    for tower, allowed in _TOWER_FIELDS.items():
        beyond += sorted(f"{tower}.{name}" for name in model_cfg[tower].keys() - allowed)
    if beyond:
        raise ValueError(f"transformers' CLIP cannot follow open_clip's {', '.join(beyond)}")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if not isinstance(vision["layers"], int):
        raise ValueError(f"only image towers that are transformers can be converted, no ResNet of {vision['layers']}")
    return Architecture(
        vision_width=vision["width"],
        text_width=text["width"],
        vision_heads=vision["width"] // vision.get("head_width", 64),
        text_heads=text["heads"],
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
    )


def from_state(state: State, found: Architecture) -> CLIPModel:
    """A CLIPModel from a state dict under OpenAI's names; arguments and errors as in `translate`."""
    return build(CLIPModel, *translate(state, found))


def translate(state: State, found: Architecture) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """The config of a dense CLIP and its tensors under our names.

    Args:
        state: its tensors under OpenAI's names; the meta device will do.
        found: heads and activation.

    Raises:
        ValueError: tensors are missing or unexpected, or the widths are those of another model.
    """
    state = {name: tensor for name, tensor in state.items() if name not in _NUMBERS}
    vision, text = (read_blocks(state, tower) for tower in ("vision", "text"))
    ours = to_ours(state, rules(vision, text, _POSITIONS), "the CLIP checkpoint")
    # open_clip has models whose scale is a vector of one.
    ours["logit_scale"] = ours["logit_scale"].reshape(())
    sizes = read_sizes(state, vision, text)
    for tower, width, heads in (
        ("vision_config", found.vision_width, found.vision_heads),
        ("text_config", found.text_width, found.text_heads),
    ):
        if sizes[tower]["hidden_size"] != width:
            raise ValueError(
                f"open_clip's configuration has width {width} in {tower}, but the checkpoint has "
                f"{sizes[tower]['hidden_size']}; name the checkpoint's own model"
            )
        sizes[tower] |= {
            "num_attention_heads": heads,
            "hidden_act": found.hidden_act,
            "layer_norm_eps": found.layer_norm_eps,
        }
    return CLIPConfig(**sizes), ours


def from_open_clip(model: "CLIP") -> CLIPModel:
    """A CLIPModel that computes what an open_clip CLIP does; the dtype is kept, the parent is left as it is.

    Raises:
        ValueError: the model has parts that transformers' CLIP lacks.
    """
    return from_state(model.state_dict(), _of_model(model))


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """The state dict under OpenAI's names, for `load_state_dict` of an open_clip CLIP of the same sizes.

    Raises:
        ValueError: the model is no dense CLIP.
    """
    vision, text = (Blocks(c.num_hidden_layers, {}) for c in (model.config.vision_config, model.config.text_config))
    return to_theirs(model.state_dict(), rules(vision, text, _POSITIONS))


def _of_model(model: "CLIP") -> Architecture:
    from open_clip.model import CLIP
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    visual = model.visual
    # The image tower first: towers of other kinds do not have the other attributes.
    if not isinstance(model, CLIP) or not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"only open_clip.CLIP with a VisionTransformer can be converted, but got {type(model).__name__} with "
            f"{type(visual).__name__}"
        )
    blocks = [*visual.transformer.resblocks, *model.transformer.resblocks]
    activations = {type(getattr(block.mlp, "gelu", None)) for block in blocks}
    norms = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    demands = {
        "plain transformer blocks": all(type(block) is ResidualAttentionBlock for block in blocks),
        "the class token as picture": visual.pool_type == "tok" and visual.attn_pool is None,
        "the end token as caption": model.text_pool_type == "argmax",
        "causal attention over text": model.attn_mask is not None,
        "GELU or QuickGELU throughout": len(activations) == 1 and activations <= {QuickGELU, nn.GELU},
        "one epsilon in all norms": len(norms) == 1,
        "no logit_bias": model.logit_bias is None,
    }
    unmet = [demand for demand, met in demands.items() if not met]
    if unmet:
        raise ValueError(f"transformers' CLIP has {', '.join(unmet)}; this open_clip model has not")
    return Architecture(
        vision_width=visual.conv1.out_channels,
        text_width=model.ln_final.normalized_shape[0],
        vision_heads=visual.transformer.resblocks[0].attn.num_heads,
        text_heads=model.transformer.resblocks[0].attn.num_heads,
        hidden_act="quick_gelu" if activations == {QuickGELU} else "gelu",
        layer_norm_eps=norms.pop(),
    )
