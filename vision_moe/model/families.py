"""The table of model families: what the rest of the package must know of a dual encoder and of its towers.

A row is found by a config's `model_type`, that of the dense model or of its mixture. Upcycling, freezing, losses,
analysis and LLaVA's tower read these rows, and nothing else tells the families apart; docs/families.md says how to add
one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

TOWERS = ("vision", "text")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """One kind of tower; paths are those of submodules, with dots."""

    modality: Literal["vision", "text"]
    """What it encodes."""
    dense: str
    """model_type of transformers' tower."""
    moe: str
    """model_type of the tower with mixtures."""
    blocks: str
    """Path of the list of blocks in the tower."""
    mlp: str = "mlp"
    """Path in a block of what the mixture replaces."""
    fc1: str = "mlp.fc1"
    """Path in a dense block of the MLP's first linear layer."""
    fc2: str = "mlp.fc2"
    """Path in a dense block of the second one; outside `mlp`, a mixture leaves an identity in its place."""
    mask: str | None = None
    """Argument of the tower's forward, [B, S], 0 at padding that takes no part; None = every token takes part."""
    class_token: bool = True
    """An image tower's hidden states start with one token that is no patch."""
    fixed_resolution: bool = True
    """An image tower takes float[B, 3, H, W] of the config's image_size."""
    positions_after_padding: bool = False
    """Positions of a text tower are counted from pad_token_id + 1."""
    required: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """Fields of the config and the only values with which a block's MLP is what this row says."""
    moe_only: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """Fields that the mixture's config adds beside MoEFields, with the values that the dense model stands for."""
    depth_fields: tuple[str, ...] = ()
    """Fields of the config that follow from its depth."""
    unused: tuple[str, ...] = ()
    """Parameters that no forward of a contrastive training reaches."""

    def dense_name(self, name: str) -> str:
        """Name in a dense block of "fc1.weight", "fc1.bias", "fc2.weight" or "fc2.bias"."""
        layer, kind = name.split(".")
        return f"{ {'fc1': self.fc1, 'fc2': self.fc2}[layer] }.{kind}"


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """One kind of dual encoder: `vision_model`, `text_model` and what compares them."""

    dense: str
    """model_type of transformers' model."""
    moe: str
    """model_type of the model with mixtures."""
    loss: Literal["softmax", "sigmoid"]
    """Contrastive loss: InfoNCE (Radford et al. 2021), or pairwise with a `logit_bias` (Zhai et al. 2023)."""
    text_padding: Literal["longest", "max_length"]
    """Captions are padded to the longest of the batch and masked, or always to the full length as part of the text."""
    processor: str
    """Name of transformers' processor class."""
    heads: tuple[str, ...] = ()
    """Paths of what lies between the towers and the common space; a path that a model lacks is passed over."""
    stretches_text: bool = False
    """The text tower's positions can be stretched as Long-CLIP does (vision_moe.positions)."""


_BERT = TowerFamily(
    modality="text",
    dense="bert",
    moe="bert_moe",
    blocks="encoder.layer",
    mlp="intermediate",
    fc1="intermediate.dense",
    fc2="output.dense",
    mask="attention_mask",
    required={"is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0},
)
_PROJECTIONS = ("visual_projection", "text_projection")

TOWER_FAMILIES = (
    TowerFamily(
        modality="vision",
        dense="clip_vision_model",
        moe="clip_moe_vision_model",
        blocks="encoder.layers",
        moe_only={"pre_layernorm": True},
    ),
    TowerFamily(
        modality="text",
        dense="clip_text_model",
        moe="clip_moe_text_model",
        blocks="encoder.layers",
        mask="attention_mask",
    ),
    TowerFamily(
        modality="vision",
        dense="siglip_vision_model",
        moe="siglip_moe_vision_model",
        blocks="encoder.layers",
        class_token=False,
    ),
    # SigLIP's captions are padded to the full length, and the last token, padding or not, stands for them.
    TowerFamily(modality="text", dense="siglip_text_model", moe="siglip_moe_text_model", blocks="encoder.layers"),
    TowerFamily(
        modality="vision",
        dense="siglip2_vision_model",
        moe="siglip2_moe_vision_model",
        blocks="encoder.layers",
        mask="pixel_attention_mask",
        class_token=False,
        fixed_resolution=False,
    ),
    TowerFamily(modality="text", dense="siglip2_text_model", moe="siglip2_moe_text_model", blocks="encoder.layers"),
    TowerFamily(modality="vision", dense="vit", moe="vit_moe", blocks="layers"),
    TowerFamily(
        modality="vision",
        dense="dinov2",
        moe="dinov2_moe",
        blocks="encoder.layer",
        required={"use_swiglu_ffn": False},
        depth_fields=("stage_names", "out_features", "out_indices"),
        unused=("embeddings.mask_token",),
    ),
    _BERT,
    replace(_BERT, dense="roberta", moe="roberta_moe", positions_after_padding=True),
    replace(_BERT, dense="xlm-roberta", moe="xlm_roberta_moe", positions_after_padding=True),
)

ENCODER_FAMILIES = (
    EncoderFamily(
        dense="clip",
        moe="clip_moe",
        loss="softmax",
        text_padding="longest",
        processor="CLIPProcessor",
        heads=_PROJECTIONS,
        stretches_text=True,
    ),
    EncoderFamily(
        dense="siglip", moe="siglip_moe", loss="sigmoid", text_padding="max_length", processor="SiglipProcessor"
    ),
    EncoderFamily(
        dense="siglip2", moe="siglip2_moe", loss="sigmoid", text_padding="max_length", processor="Siglip2Processor"
    ),
    EncoderFamily(
        dense="vision-text-dual-encoder",
        moe="vision-text-dual-encoder-moe",
        loss="softmax",
        text_padding="longest",
        processor="VisionTextDualEncoderProcessor",
        # Poolers too: many a checkpoint has none, and transformers then starts with random ones.
        heads=(*_PROJECTIONS, "vision_model.pooler", "text_model.pooler"),
    ),
)

Family = TypeVar("Family", TowerFamily, EncoderFamily)


def _by_type(families: Iterable[Family]) -> Mapping[str, Family]:
    return MappingProxyType({name: family for family in families for name in (family.dense, family.moe)})


TOWER_BY_TYPE = _by_type(TOWER_FAMILIES)
ENCODER_BY_TYPE = _by_type(ENCODER_FAMILIES)


def tower_family(config: Any) -> TowerFamily:
    """The row of a tower's config.

    Raises:
        ValueError: there is none.
    """
    return _row(TOWER_BY_TYPE, config.model_type, "tower")


def encoder_family(config: Any) -> EncoderFamily:
    """The row of a dual encoder's config.

    Raises:
        ValueError: there is none.
    """
    return _row(ENCODER_BY_TYPE, config.model_type, "dual encoder")


def _row(table: Mapping[str, Family], model_type: str, noun: str) -> Family:
    if model_type not in table:
        raise ValueError(
            f"{model_type!r} is no {noun} that vision_moe knows; the known ones are {', '.join(table)} "
            f"(vision_moe.model.families)"
        )
    return table[model_type]


def max_text_tokens(config: Any) -> int:
    """Longest caption, in tokens, that a text tower's positions allow."""
    family = TOWER_BY_TYPE.get(config.model_type)
    before = config.pad_token_id + 1 if family is not None and family.positions_after_padding else 0
    return int(config.max_position_embeddings) - before


def text_padding(config: Any) -> Literal["longest", "max_length"]:
    """How a dual encoder's captions are padded, see `EncoderFamily`; "longest" for a model outside the table."""
    family = ENCODER_BY_TYPE.get(config.model_type)
    return "longest" if family is None else family.text_padding


class BlockTensor(NamedTuple):
    """Where a tensor of a dual encoder with mixtures stands.

    Attributes:
        block: path of its block, from the model.
        leaf: its name below the mixture (or below what a dense block has there).
        family: of its tower.
    """

    block: str
    leaf: str
    family: TowerFamily


def block_tensor(config: Any, name: str) -> BlockTensor | None:
    """Splits the name of a tensor below a block's MLP; None for any other tensor."""
    for tower in TOWERS:
        family = tower_family(getattr(config, f"{tower}_config"))
        blocks, mlp = re.escape(f"{tower}_model.{family.blocks}"), re.escape(family.mlp)
        if found := re.fullmatch(rf"({blocks}\.\d+)\.{mlp}\.(.+)", name):
            return BlockTensor(found[1], found[2], family)
    return None
