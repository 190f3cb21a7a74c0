"""A LIMoE from nothing, as a recipe wants it."""

import dataclasses
from typing import Any

import torch
from transformers import CLIPProcessor, set_seed

from vision_moe.mixture_config import resolve_layers
from vision_moe.model import LIMoEConfig, LIMoEModel
from vision_moe.moe.losses import AuxLossWeights
from vision_moe.recipe import OneTowerConfig, ScratchConfig, TrainConfig
from vision_moe.scratch import sincos_positions


def build_limoe(config: TrainConfig, processor: CLIPProcessor) -> LIMoEModel:
    """A LIMoE with random weights for the pictures and tokens of a processor.

    Args:
        config: the recipe; `limoe_tower` and `scratch` give the sizes, `seed` the weights.
        processor: its tokenizer gives vocabulary and caption length, its image processor the picture size.
    """
    scratch = config.scratch
    set_seed(config.seed)
    model = LIMoEModel(LIMoEConfig(**_sizes(scratch, processor), **_mixture(config.limoe_tower)))
    if scratch.positions == "sincos2d":
        side = model.config.image_size // model.config.patch_size
        with torch.no_grad():
            model.vision_embeddings.position_embedding.weight.copy_(sincos_positions(side, scratch.hidden_size))
    return model


def _sizes(scratch: ScratchConfig, processor: CLIPProcessor) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {
        "hidden_size": scratch.hidden_size,
        "intermediate_size": 4 * scratch.hidden_size,
        "num_attention_heads": scratch.num_heads,
        "projection_dim": scratch.projection_dim,
        "image_size": processor.image_processor.crop_size["height"],
        "patch_size": scratch.patch_size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _mixture(tower: OneTowerConfig) -> dict[str, Any]:
    losses = _losses(tower.all_losses, tower.entropy_losses)
    names = {
        "load_balance": "router_aux_loss_coef",
        "balance_top_k": "balance_top_k",
        "global_entropy_min_experts": "router_global_entropy_min_experts",
    }
    return {
        "num_hidden_layers": tower.num_layers,
        "num_experts": tower.num_experts,
        "num_experts_per_tok": tower.num_experts_per_tok,
        "moe_layers": resolve_layers(tower.layers, tower.num_layers),
        "capacity_factor": tower.capacity_factor,
        "batch_priority": tower.batch_priority,
        "router_noise_std": tower.router_noise_std,
        "local_router_losses": tower.local_router_losses,
        "image_router_losses": _losses(tower.image_losses, tower.entropy_losses),
        "text_router_losses": _losses(tower.text_losses, tower.entropy_losses),
        **{names.get(name, f"router_{name}_loss_coef"): value for name, value in losses.items()},
    }


def _losses(weights: AuxLossWeights, entropy_losses: bool) -> dict[str, Any]:
    if not entropy_losses:
        weights = dataclasses.replace(weights, local_entropy=0.0, global_entropy=0.0)
    return dataclasses.asdict(weights)
