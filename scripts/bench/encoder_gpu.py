"""Image towers on one GPU: CLIP-MoE on our kernels and on transformers' against dense CLIP; bfloat16, random weights.

.venv/bin/python scripts/bench/encoder_gpu.py --output runs/bench/encoder_gpu.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from experts_gpu import milliseconds
from measure import Row, rows_of, table, write_json
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vision_moe import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.moe.router import Router

SIZES = {
    "B/16-224 B=128": (128, 768, 3072, 12, 12, 16, 224),
    "L/14-336 B=32": (32, 1024, 4096, 24, 16, 14, 336),
}
DENSE = "dense, transformers"


def make_towers(width: int, hidden: int, layers: int, heads: int, patch: int, image: int) -> dict[str, nn.Module]:
    """The dense tower and the mixture, of 4 experts, top 2, in all layers."""
    fields = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": heads, "patch_size": patch, "image_size": image}
    with torch.device("cuda"):
        dense = CLIPVisionModel(CLIPVisionConfig(**fields))
        mixture = CLIPMoEVisionModel(CLIPMoEVisionConfig(**fields, num_experts=4, num_experts_per_tok=2))
    for module in mixture.modules():
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.1)
    return {"dense": dense.to(torch.bfloat16), "mixture": mixture.to(torch.bfloat16)}


def make_run(
    tower: nn.Module, pictures: torch.Tensor, *, training: bool, experts: str | None = None
) -> Callable[[], object]:
    """A forward pass, or one with all gradients, by an implementation of the experts."""

    def run() -> None:
        if experts is not None:
            tower.set_experts_implementation(experts)
        with torch.set_grad_enabled(training):
            hidden = tower(pixel_values=pictures).last_hidden_state
        if training:
            hidden.float().square().mean().backward()
            tower.zero_grad()

    return run


def main() -> None:
    """Prints one table of ratios and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/encoder_gpu.json"))
    args = parser.parse_args()
    rows: list[Row] = []
    for case, (batch, *sizes) in SIZES.items():
        torch.manual_seed(0)
        towers = make_towers(*sizes)
        pictures = torch.randn(batch, 3, sizes[-1], sizes[-1], device="cuda", dtype=torch.bfloat16)
        for kind in ("forward", "training"):
            training = kind == "training"
            runs = {DENSE: make_run(towers["dense"], pictures, training=training)}
            for name in ("eager", "grouped_mm", "vision_moe"):
                runs[f"CLIP-MoE, {name}"] = make_run(towers["mixture"], pictures, training=training, experts=name)
            for run in runs.values():
                milliseconds(run)
            turns = [{name: milliseconds(run) for name, run in runs.items()} for _ in range(args.rounds)]
            seconds = {name: [turn[name] / 1000 for turn in turns] for name in runs}
            for row in rows_of(seconds, DENSE, case=case, **{"pass": kind}):
                rows.append({**row, "pictures/s": batch / float(row["seconds"])})
        del towers, runs
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(rows, ("case", "pass", "variant", "ratio", "least", "greatest", "seconds", "pictures/s")))
    write_json(rows, args.output, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
