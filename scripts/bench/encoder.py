"""Image towers on CPU: CLIP-MoE on our kernels and as a loop, dense open_clip and transformers' CLIP; random weights.

4 experts, top 2, in all layers; the loop has torch's Linears throughout.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import open_clip
import torch
from layers import DTYPES
from loop_experts import LoopExperts
from measure import OURS, Row, comparisons, interleave
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vision_moe import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.kernels.linear import Linear
from vision_moe.moe.router import Router
from vision_moe.patch_dropout import drop_patches

LOOP = "CLIP-MoE, loop"
OPEN_CLIP = "dense, open_clip"
TRANSFORMERS = "dense, transformers"
OURS_DENSE = "dense, vision_moe"


def sizes(patch_size: int, image_size: int, *, tiny: bool) -> dict[str, int]:
    """Fields of a vision config: CLIP's ViT-B, or two thin layers."""
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return {**(width if tiny else base), "patch_size": patch_size, "image_size": image_size, "projection_dim": 512}


def flop(fields: Mapping[str, int], top_k: int) -> float:
    """Floating-point operations of one picture's forward pass, attention's products included."""
    tokens, D = (fields["image_size"] // fields["patch_size"]) ** 2 + 1, fields["hidden_size"]
    weights = 4 * D * D + 2 * top_k * D * fields["intermediate_size"]
    return 2.0 * fields["num_hidden_layers"] * tokens * (weights + 2 * tokens * D)


def plain_linear(layer: Linear) -> nn.Linear:
    """torch's Linear with the same parameters."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def as_loop(tower: nn.Module) -> nn.Module:
    """A copy of the tower whose experts are a loop and whose Linears are torch's."""
    tower = copy.deepcopy(tower)
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, plain_linear(child))
            elif name == "experts":
                setattr(module, name, LoopExperts(child))
    return tower


def make_towers(fields: Mapping[str, int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Name to tower."""
    torch.manual_seed(0)
    moe = CLIPMoEVisionModel(CLIPMoEVisionConfig(**fields, num_experts=4, num_experts_per_tok=2))
    head_width = fields["hidden_size"] // fields["num_attention_heads"]
    vision = {"layers": fields["num_hidden_layers"], "width": fields["hidden_size"], "head_width": head_width}
    vision |= {"patch_size": fields["patch_size"], "image_size": fields["image_size"]}
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 2, "layers": 1}
    towers: dict[str, nn.Module] = {
        LOOP: as_loop(moe),
        OURS: moe,
        OPEN_CLIP: open_clip.CLIP(512, vision, text, quick_gelu=True).visual,
        TRANSFORMERS: CLIPVisionModel(CLIPVisionConfig(**fields)),
        OURS_DENSE: CLIPMoEVisionModel(CLIPMoEVisionConfig(**fields, moe_layers=[])),
    }
    return {name: tower.eval().to(dtype) for name, tower in towers.items()}


def forward_rows(rounds: int, peaks: Mapping[torch.dtype, float], batch: int, *, tiny: bool) -> list[Row]:
    """ViT-B/16, forward."""
    rows: list[Row] = []
    fields = sizes(16, 224, tiny=tiny)
    for dtype, peak in peaks.items():
        pixels, towers = torch.randn(batch, 3, 224, 224).to(dtype), make_towers(fields, dtype)
        with torch.no_grad():
            runners = {name: partial(tower, pixels) for name, tower in towers.items()}
            seconds = interleave(runners, rounds, f"tower {DTYPES[dtype]}")
        # Before the next are made: the five take 4 GB.
        del towers, runners
        is_full = dtype == torch.float32
        limits = {LOOP: 0.5 if is_full else 1.0, OPEN_CLIP: 0.75 if is_full else None}
        limits |= {TRANSFORMERS: None, OURS_DENSE: 1.45 if is_full else 1.66}
        about = {"case": f"ViT-B/16 E=4, batch {batch}", "work": f"{DTYPES[dtype]} forward"}
        rows += comparisons(seconds, limits, **about, flop_share=batch * flop(fields, 2) / peak)
        about["case"] = f"ViT-B/16 dense, batch {batch}"
        dense = {OPEN_CLIP: None, TRANSFORMERS: None}
        best = batch * flop(fields, 1) / peak
        rows += comparisons(seconds, dense, **about, ours=OURS_DENSE, flop_share=best)
    return rows


def step(tower: nn.Module, pixels: Tensor) -> Callable[[], None]:
    """A forward and backward pass of what trains, gradients thrown away."""

    def run() -> None:
        output = tower(pixels)
        embeds = output if isinstance(output, Tensor) else output.pooler_output
        embeds.square().sum().backward()
        tower.zero_grad(set_to_none=True)

    return run


def set_stage(tower: nn.Module, stage: str) -> None:
    """Freezes what a stage does not train: "all", "experts" (MCL) or "router"."""
    for module in tower.modules():
        is_router, is_experts = isinstance(module, Router), type(module).__name__ in ("Experts", "LoopExperts")
        if stage == "all" or (stage == "router" and is_router) or (stage == "experts" and is_experts):
            module.requires_grad_(True)


def training_rows(rounds: int, peak: float, batch: int, *, tiny: bool) -> list[Row]:
    """ViT-B/32, forward and backward in float32: everything, the experts, or the routers alone."""
    fields = sizes(32, 224, tiny=tiny)
    pixels, towers = torch.randn(batch, 3, 224, 224), make_towers(fields, torch.float32)
    rows: list[Row] = []
    case = f"ViT-B/32 E=4, batch {batch}"
    for stage, limit in (("all", None), ("experts", None), ("router", 0.6)):
        for tower in towers.values():
            set_stage(tower.requires_grad_(False), stage)
        chosen = list(towers) if stage == "all" else [LOOP, OURS]
        seconds = interleave({name: step(towers[name], pixels) for name in chosen}, rounds, f"step, {stage}")
        baselines = {LOOP: limit, OPEN_CLIP: None} if stage == "all" else {LOOP: limit}
        best = 3 * batch * flop(fields, 2) / peak if stage == "all" else None
        work = f"fp32 forward + backward, trains {stage}"
        rows += comparisons(seconds, baselines, case=case, work=work, flop_share=best)
    return rows


def patch_dropout_rows(rounds: int, batch: int, *, tiny: bool) -> list[Row]:
    """ViT-B/32 in training with half of its patches (FLIP)."""
    tower = CLIPMoEVisionModel(CLIPMoEVisionConfig(**sizes(32, 224, tiny=tiny), num_experts=4, num_experts_per_tok=2))
    pixels = torch.randn(batch, 3, 224, 224)

    def dropped() -> None:
        hook = tower.embeddings.register_forward_hook(
            lambda module, inputs, output: drop_patches(output, 0.5, num_class_tokens=1)
        )
        step(tower, pixels)()
        hook.remove()

    seconds = interleave({"all patches": step(tower, pixels), OURS: dropped}, rounds, "patch dropout")
    work = "fp32 forward + backward, half of the patches"
    return comparisons(seconds, {"all patches": None}, case=f"ViT-B/32 E=4, batch {batch}", work=work)


def all_rows(rounds: int, peaks: Mapping[torch.dtype, float], *, tiny: bool) -> list[Row]:
    """The table's rows on towers."""
    rounds = min(rounds, 3)
    batch = 1 if tiny else 4
    return [
        *forward_rows(rounds, peaks, batch, tiny=tiny),
        *training_rows(rounds, peaks[torch.float32], batch, tiny=tiny),
        *patch_dropout_rows(rounds, batch, tiny=tiny),
    ]
