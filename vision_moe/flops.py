"""Inference FLOPs of dense and MoE CLIPs, counted from their configs: `python -m vision_moe.flops`.

Counted are the matrix products of one picture or one caption, 2 FLOPs for a multiply-add: attention (projections and
both products with the S x S weights, in full under the causal mask too), MLPs or the experts in use, routers, the
patch convolution and the projections. Left out are biases, norms, activations, softmax, lookups, gather and scatter.

S tokens, D model dim, E experts, K experts per token.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModel, CLIPConfig

from vision_moe.assets import find_model
from vision_moe.config import parse
from vision_moe.files import write_json
from vision_moe.mixture_config import resolve_layers
from vision_moe.model import CLIPMoEConfig
from vision_moe.model.configuration import MoEFields
from vision_moe.model.counts import count_parameters
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

# OpenAI's models under open_clip's names: width, depth, patch and picture of the image tower; width of the text tower,
# which has 12 blocks; embedding. Heads are 64 wide, MLPs 4 D.
_PRESETS = {
    "ViT-B-32": (768, 12, 32, 224, 512, 512),
    "ViT-B-16": (768, 12, 16, 224, 512, 512),
    "ViT-L-14": (1024, 24, 14, 224, 768, 768),
    "ViT-L-14-336": (1024, 24, 14, 336, 768, 768),
}
Preset = Literal["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"]


class TowerFlops(NamedTuple):
    """FLOPs of one tower on one picture or caption.

    Attributes:
        attention: of all blocks.
        mlp: of all blocks, with the experts that the tokens pass.
        router: of all mixtures.
        stem: the patch convolution; 0 for text.
        projection: into the common space.
    """

    attention: int
    mlp: int
    router: int
    stem: int
    projection: int

    @property
    def blocks(self) -> int:
        """Attention, MLPs and routers: what most papers quote."""
        return self.attention + self.mlp + self.router


class Row(NamedTuple):
    """One model of the table.

    Attributes:
        model: its name.
        moe: its mixtures in words.
        parameters: all of them, with both position tables and the projections.
        activated: those that a token passes, see `vision_moe.model.counts`.
        image: FLOPs of one picture.
        text: FLOPs of one caption.
    """

    model: str
    moe: str
    parameters: int
    activated: int
    image: TowerFlops
    text: TowerFlops

    @property
    def blocks(self) -> int:
        """FLOPs of the blocks of both towers on one pair."""
        return self.image.blocks + self.text.blocks


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """Which models are compared.

    Example:
        .venv/bin/python -m vision_moe.flops --presets '[ViT-B-16]'
    """

    presets: tuple[Preset, ...] = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
    """OpenAI's models, each dense and with mixtures."""
    reference: Preset = "ViT-L-14"
    """Dense model whose blocks are 100 %."""
    layers: tuple[str, ...] = ("odd", "all")
    """Blocks that are mixtures, one row each: all, odd, or every_3 and the like."""
    num_experts: int = 8
    """Experts per mixture."""
    num_experts_per_tok: int = 2
    """Experts of each token."""
    eval_capacity_factor: float | None = None
    """Cap on the experts' tokens in inference; below 1 it lowers the FLOPs."""
    model: str | None = None
    """Folder or hub name of one more model, as its config says."""
    output: Path | None = None
    """JSON file for the same numbers in full."""


def vision_flops(config: Any, projection_dim: int) -> TowerFlops:
    """FLOPs of an image tower on one picture, from a CLIPVisionConfig or CLIPMoEVisionConfig."""
    num_patches = (config.image_size // config.patch_size) ** 2
    stem = 2 * config.num_channels * config.patch_size**2 * config.hidden_size * num_patches
    return _tower_flops(config, 1 + num_patches, projection_dim, stem)


def text_flops(config: Any, projection_dim: int) -> TowerFlops:
    """FLOPs of a text tower on one caption of full length, from a CLIPTextConfig or CLIPMoETextConfig."""
    return _tower_flops(config, config.max_position_embeddings, projection_dim, stem=0)


def preset_config(name: Preset, layers: str | None = None, **fields: Any) -> CLIPMoEConfig:
    """The config of one of OpenAI's models; `layers` and the fields of `MoEFields` make it a mixture.

    Args:
        name: as open_clip calls it.
        layers: as in `vision_moe.upcycle.upcycle`; None = dense.
        **fields: of both towers.
    """
    width, depth, patch_size, image_size, text_width, projection_dim = _PRESETS[name]

    def tower(width: int, depth: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        moe_layers = [] if layers is None else resolve_layers(layers, depth)
        return {**sizes, "num_hidden_layers": depth, "moe_layers": moe_layers, **fields}

    return CLIPMoEConfig(
        vision_config={**tower(width, depth), "patch_size": patch_size, "image_size": image_size},
        text_config=tower(text_width, 12),
        projection_dim=projection_dim,
    )


def count(name: str, config: CLIPConfig, moe: str = "") -> Row:
    """The row of one model; its parameters are counted on the meta device."""
    with torch.device("meta"):
        parameters = count_parameters(AutoModel.from_config(config))
    image = vision_flops(config.vision_config, config.projection_dim)
    return Row(name, moe, *parameters, image, text_flops(config.text_config, config.projection_dim))


def table(rows: list[Row], reference: Row) -> str:
    """The rows as Markdown, the shares being those of the reference's blocks."""
    lines = [
        "| model | mixtures | parameters | activated | GFLOPs, image | text | blocks only, image | text | blocks, % of "
        f"{reference.model} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        flops = (sum(row.image), sum(row.text), row.image.blocks, row.text.blocks)
        cells = [row.model, row.moe or "none", f"{row.parameters / 1e6:.1f} M", f"{row.activated / 1e6:.1f} M"]
        cells += [f"{value / 1e9:.2f}" for value in flops]
        lines.append(f"| {' | '.join(cells)} | {100 * row.blocks / reference.blocks:.1f} |")
    lines += ["", "One picture and one caption of full length; a multiply-add counts as 2 FLOPs."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the table, and writes the numbers."""
    setup_logging()
    config = parse(FlopsConfig)
    fields = {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "eval_capacity_factor": config.eval_capacity_factor,
    }
    words = f"top {config.num_experts_per_tok} of {config.num_experts} in"
    rows = []
    for name in config.presets:
        rows.append(count(name, preset_config(name)))
        for layers in config.layers:
            rows.append(count(name, preset_config(name, layers, **fields), f"{words} {layers} blocks"))
    if config.model is not None:
        rows.append(count(config.model, AutoConfig.from_pretrained(find_model(config.model)), "as configured"))
    reference = count(config.reference, preset_config(config.reference))
    sys.stdout.write(table(rows, reference))
    if config.output is not None:
        write_json(config.output, {"rows": [_plain(row) for row in rows], "reference": _plain(reference)})
        logger.info("numbers: %s", config.output)


def _tower_flops(config: Any, num_tokens: int, projection_dim: int, stem: int) -> TowerFlops:
    S, D, depth = num_tokens, config.hidden_size, config.num_hidden_layers
    mixtures = len(config.moe_block_indices) if isinstance(config, MoEFields) else 0
    # Query, key, value and output; then the scores and the weighted sum.
    attention = 2 * (4 * S * D * D + 2 * S * S * D)
    mlp = (depth - mixtures) * _mlp_flops(S, D, config.intermediate_size)
    if mixtures:
        experts = _experts_per_token(config) + config.shared_expert
        mlp += round(mixtures * experts * _mlp_flops(S, D, config.expert_dim))
    router = 2 * S * D * config.num_experts * mixtures if mixtures else 0
    return TowerFlops(depth * attention, mlp, router, stem, 2 * D * projection_dim)


def _mlp_flops(num_tokens: int, dim: int, hidden_dim: int) -> int:
    return 2 * 2 * num_tokens * dim * hidden_dim


def _experts_per_token(config: MoEFields) -> float:
    """Experts that compute a token in inference, on average and at most: a full place is counted as used."""
    factor = config.eval_capacity_factor
    if config.router_type == "expert_choice":
        assert factor is not None
        return min(factor, config.num_experts)
    return config.num_experts_per_tok * (1 if factor is None else min(1, factor))


def _plain(row: Row) -> dict[str, Any]:
    towers = {
        name: {**tower._asdict(), "blocks": tower.blocks} for name, tower in (("image", row.image), ("text", row.text))
    }
    return {**row._asdict(), **towers}


if __name__ == "__main__":
    main()
