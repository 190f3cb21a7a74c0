"""What LLaVA writes into config.json beside the language model's fields, read and written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from mllm.images import AspectRatio
from mllm.model import LlavaMoEForConditionalGeneration

_SELECT_FEATURE = {"default": "patch", "full": "cls_patch"}
# Fields by which transformers before version 5 called what LlamaConfig holds under another name.
_OLD_FIELDS = ("rope_theta", "rope_scaling", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class LlavaSettings:
    """How a LLaVA joins its parts; the defaults are LLaVA-1.5's."""

    vision_tower: str | None = None
    """Folder or hub name of the tower."""
    projector: str = "mlp2x_gelu"
    """LLaVA's name of the projector."""
    select_layer: int = -2
    """Hidden state of the tower that the language model sees."""
    select_feature: str = "patch"
    """"patch", or "cls_patch" with the class token."""
    image_aspect_ratio: AspectRatio = "pad"
    """How pictures become square."""


def has_settings(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of LLaVA's, and not that of a plain language model."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def read_settings(config: Mapping[str, Any]) -> LlavaSettings:
    """Settings of a config.json that LLaVA wrote; what it leaves out is what LLaVA's code then takes.

    Raises:
        ValueError: the model frames its pictures in tokens that no template of ours writes.
    """
    if config.get("mm_use_im_start_end"):
        raise ValueError("mm_use_im_start_end is set: the model expects <im_start> and <im_end>, which are not written")
    return LlavaSettings(
        vision_tower=config.get("mm_vision_tower"),
        projector=config.get("mm_projector_type", "linear"),
        select_layer=config.get("mm_vision_select_layer", -1),
        select_feature=config.get("mm_vision_select_feature", "patch"),
        image_aspect_ratio=config.get("image_aspect_ratio") or "square",
    )


def language_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The language model's share of a config.json of LLaVA or of a plain Llama.

    Raises:
        ValueError: the language model is no Llama.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "llava_llama") and not (kind == "llava" and has_settings(config)):
        raise ValueError(f"the language model must be a Llama (llama, llava_llama), but config.json says {kind!r}")
    known = {*LlamaConfig().to_dict(), *_OLD_FIELDS} - {"model_type", "architectures", "transformers_version"}
    return LlamaConfig(**{name: value for name, value in config.items() if name in known and value is not None})


def llava_config(model: LlavaMoEForConditionalGeneration, vision_tower: str, select_layer: int) -> dict[str, Any]:
    """The config.json of `LlavaLlamaForCausalLM` for a model of ours.

    Args:
        model: with a Llama and a projector of GELU.
        vision_tower: folder or hub name that LLaVA shall take the tower from.
        select_layer: hidden state of that tower that the language model sees.

    Raises:
        ValueError: LLaVA has no name for the model's language model or projector.
    """
    ours, text = model.config, model.config.text_config
    if text.model_type != "llama" or ours.projector_hidden_act != "gelu":
        raise ValueError(
            f"LLaVA's layout is for a Llama with the projector mlp2x_gelu, but the model has a {text.model_type!r} and "
            f"the activation {ours.projector_hidden_act!r}"
        )
    fields = text.to_dict()
    rope = fields.pop("rope_parameters")
    fields.pop("dtype", None)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    return {
        **fields,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "tie_word_embeddings": ours.tie_word_embeddings,
        "mm_vision_tower": vision_tower,
        "mm_vision_select_layer": select_layer,
        "mm_vision_select_feature": _SELECT_FEATURE[ours.vision_feature_select_strategy],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": ours.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": ours.image_aspect_ratio,
    }
