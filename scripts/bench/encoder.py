"""ViT-B/16 image towers on CPU, forward: CLIP-MoE on our kernels and as a loop, dense open_clip and transformers' CLIP.

.venv/bin/python scripts/bench/encoder.py --rounds 5 --output runs/bench/encoder.json
Random weights; 4 experts, top 2, in all layers; the loop has torch's Linears throughout.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import open_clip
import torch
from loop_experts import LoopExperts
from measure import Row, interleave, print_table, rows_of, write_json
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vision_moe import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.kernels.linear import Linear

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "projection_dim": 512,
}
TINY = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


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


def make_towers(*, tiny: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Name to tower."""
    sizes = TINY if tiny else SIZES
    torch.manual_seed(0)
    moe = CLIPMoEVisionModel(CLIPMoEVisionConfig(**sizes, num_experts=4, num_experts_per_tok=2))
    vision = {"layers": sizes["num_hidden_layers"], "width": sizes["hidden_size"], "patch_size": 16, "image_size": 224}
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 2, "layers": 1}
    towers: dict[str, nn.Module] = {
        "CLIP-MoE, loop": as_loop(moe),
        "CLIP-MoE, vision_moe": moe,
        "dense, open_clip": open_clip.CLIP(
            512, {**vision, "head_width": sizes["hidden_size"] // sizes["num_attention_heads"]}, text, quick_gelu=True
        ).visual,
        "dense, transformers": CLIPVisionModel(CLIPVisionConfig(**sizes)),
        "dense, vision_moe": CLIPMoEVisionModel(CLIPMoEVisionConfig(**sizes, moe_layers=[])),
    }
    return {name: tower.eval().to(dtype) for name, tower in towers.items()}


def main() -> None:
    """Prints one table of ratios and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/encoder.json"))
    parser.add_argument("--tiny", action="store_true", help="small towers, to see that everything runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(args.batch, 3, 224, 224).to(dtype)
        towers = make_towers(tiny=args.tiny, dtype=dtype)
        with torch.no_grad():
            runners = {name: partial(tower, images) for name, tower in towers.items()}
            seconds = interleave(runners, args.rounds, str(dtype))
        for baseline in ("CLIP-MoE, loop", "dense, open_clip"):
            rows += rows_of(seconds, baseline, dtype=str(dtype).removeprefix("torch."), batch=args.batch)
    print_table(rows, ("dtype", "batch", "variant", "baseline", "ratio", "ratio_min", "ratio_max", "seconds"))
    write_json(rows, args.output)


if __name__ == "__main__":
    main()
